import numpy as np

from dapo_edge.data.captions import vocabulary, write_caption
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.materials import MATERIALS
from dapo_edge.data.protocol import surfaces_v1


def captions(material, defects, count=300):
    return [write_caption(np.random.default_rng(seed), material, defects) for seed in range(count)]


def test_every_material_and_defect_has_words():
    words = vocabulary()
    assert list(words["materials"]) == list(MATERIALS)
    assert list(words["defects"]) == list(DEFECTS)
    for phrases in (*words["materials"].values(), *words["defects"].values()):
        assert len(phrases) >= 2
        assert len(set(phrases)) == len(phrases)


def test_no_word_stands_for_two_things():
    for kind in ("materials", "defects"):
        phrases = [phrase for synonyms in vocabulary()[kind].values() for phrase in synonyms]
        assert len(set(phrases)) == len(phrases)


def test_a_caption_holds_a_word_for_everything_that_it_claims():
    words = vocabulary()
    for caption in captions("wood", ("rust", "missing piece", "cut")):
        things = words["objects"] if caption.material is None else words["materials"]["wood"]
        assert any(thing in caption.text for thing in things)
        assert caption.defects == ("rust", "missing piece", "cut")
        assert all(any(phrase in caption.text for phrase in words["defects"][name]) for name in caption.defects)
        assert "{" not in caption.text


def test_good_captions_name_no_defect():
    phrases = [phrase for synonyms in vocabulary()["defects"].values() for phrase in synonyms]
    for caption in captions("leather", ()):
        assert caption.defects == ()
        assert not any(phrase in caption.text for phrase in phrases)


def test_wording_varies_and_repeats():
    texts = [caption.text for caption in captions("paper", ("burn",))]
    assert len(set(texts)) > 100
    assert texts == [caption.text for caption in captions("paper", ("burn",))]
    assert 0.25 < np.mean([caption.material is None for caption in captions("paper", ("burn",))]) < 0.55


def test_the_split_of_surfaces_v1_covers_the_world_once():
    split = surfaces_v1()
    materials = split.tuned_materials + split.new_materials + split.unseen_materials
    assert sorted(materials) == sorted(MATERIALS)
    assert sorted(split.tuned_defects + split.novel_defects) == sorted(DEFECTS)
    assert len(split.unseen_materials) == 2
    assert 3 * len(split.tuned_materials) == 2 * len(MATERIALS)
    assert 3 * len(split.tuned_defects) == 2 * len(DEFECTS)
