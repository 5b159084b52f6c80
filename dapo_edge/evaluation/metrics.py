"""How good defect maps, image scores and defect types are, counted in one pass and in constant memory per map.

The two usual costs are gone: AUPRO doesn't walk through every map once per threshold, and no map is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import BackendError
from dapo_edge.evaluation.histograms import Curve, FloatArray, Histogram, area_under, bin_of, rising_share
from dapo_edge.extras import require
from dapo_edge.structures import NORMAL

BINS = 1 << 17  # nowhere wider than 2^16 even bins; 2 MB per histogram
AUPRO_FPR_LIMIT = 0.3  # the limit of every published AUPRO (Bergmann et al., CVPR 2019)
ECE_BINS = 10
ROUNDING = 1e-5  # sums of float32 in another order leave [0, 1] by less

Mask = NDArray[np.bool_]
TypeMap = NDArray[np.uint8]


@dataclass(frozen=True)
class Summary:
    """All metrics as fractions. NaN where one is undefined: a ranking without good or without defective images (or
    pixels), AUPRO and type metrics without a defect, calibration without an image."""

    image_auroc: float
    image_ap: float
    image_f1_max: float
    pixel_auroc: float
    pixel_ap: float
    pixel_f1_max: float
    aupro: float  # false positive rate below AUPRO_FPR_LIMIT, rescaled to 0..1
    type_pixel_auroc: float  # one type against all other pixels, mean over the types that occur
    type_pixel_ap: float
    type_pixel_f1_max: float
    type_accuracy: float  # share of the true defect regions whose type is right
    type_chance: float  # what guessing would reach: 1 / K
    image_ece: float
    images: int
    defective_images: int

    def as_json(self) -> dict[str, float | int | None]:
        """The fields in order; None stands for NaN, which JSON doesn't know."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


class PixelMetrics:
    """Anomaly maps against masks."""

    def __init__(self) -> None:
        self.regions = 0  # true ones, over all images
        self._histogram = Histogram(BINS)
        self._overlap = np.zeros(BINS)  # per bin, each pixel of a true region counts 1 / (area of its region)

    def add(self, anomaly: FloatArray, mask: Mask) -> None:
        """Count one map [H, W] in [0, 1] against the defective pixels [H, W]."""
        _check_probabilities("the anomaly map", anomaly)
        if mask.dtype != bool or mask.shape != anomaly.shape or mask.ndim != 2:
            raise ValueError(f"a map {anomaly.shape} needs a bool mask of its size, not {mask.dtype} {mask.shape}")
        place = bin_of(anomaly, BINS)
        self._histogram.add(place, mask)
        if mask.any():
            region = _regions(mask)
            areas = np.bincount(region)
            self._overlap += np.bincount(place[mask], 1 / areas[region], BINS)
            self.regions += areas.size

    def merge(self, other: PixelMetrics) -> None:
        """Count all that `other` counted, too."""
        self.regions += other.regions
        self._histogram.counts += other._histogram.counts
        self._overlap += other._overlap

    def curve(self) -> Curve:
        """All pixels of all images, defective against good ones."""
        return self._histogram.curve()

    def aupro(self, fpr_limit: float = AUPRO_FPR_LIMIT) -> float:
        """Area under the per-region overlap (PRO) up to a false positive rate, divided by that rate.

        PRO at a threshold is the mean over all true regions (8-connected) of the share that is flagged (Bergmann et
        al., CVPR 2019): a recall in which a pixel weighs 1 / (regions · area of its region). So it comes from a
        histogram like any recall. The rate is over all good pixels of all images.
        """
        curve = self.curve()
        if not curve.defined:
            return math.nan
        return area_under(rising_share(curve.negatives), rising_share(self._overlap[::-1]), fpr_limit)


class ImageMetrics:
    """Image scores against labels: few enough to keep."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.defective: list[bool] = []

    def add(self, score: float, defective: bool) -> None:
        """Count one image; its score is in [0, 1]."""
        _check_probabilities("the image score", np.asarray(score, np.float64))
        self.scores.append(float(score))
        self.defective.append(bool(defective))

    def merge(self, other: ImageMetrics) -> None:
        """Count all that `other` counted, too."""
        self.scores += other.scores
        self.defective += other.defective

    def curve(self) -> Curve:
        """All images, defective against good ones."""
        return Curve.of_scores(self.scores, self.defective)

    def calibration_error(self) -> float:
        """Expected calibration error of the score as probability of a defect (Guo et al., ICML 2017).

        Σ over bins of (share of the images) · |mean score - share of defective ones|.
        """
        if not self.scores:
            return math.nan
        scores, defective = np.asarray(self.scores), np.asarray(self.defective)
        place = np.clip((scores * ECE_BINS).astype(np.intp), 0, ECE_BINS - 1)
        gaps = np.bincount(place, scores - defective, ECE_BINS)
        return float(np.abs(gaps).sum() / scores.size)


class TypeMetrics:
    """Defect maps against true types. `names` is K + 1 long and begins with normal."""

    def __init__(self, names: Sequence[str]) -> None:
        if len(names) < 2 or names[0] != NORMAL or len({*names}) < len(names):
            raise ValueError(f"names are '{NORMAL}' and at least one defect type, each once, not {list(names)}")
        self.names = tuple(names)
        self.confusion = np.zeros((self.types, self.types), np.int64)  # [true, predicted], counts of regions
        self._histograms = [Histogram(BINS) for _ in range(self.types)]

    @property
    def types(self) -> int:
        """K."""
        return len(self.names) - 1

    def add(self, probabilities: FloatArray, types: TypeMap) -> None:
        """Count a defect map [K+1, H, W] against the true types [H, W]: 0 is good, k is `names[k]`."""
        self.check(probabilities, types)
        for k, histogram in enumerate(self._histograms, start=1):
            inside = types == k
            histogram.add(bin_of(probabilities[k], BINS), inside)
            if inside.any():
                self.confusion[k - 1] += np.bincount(_vote(probabilities[1:], inside), minlength=self.types)

    def check(self, probabilities: FloatArray, types: TypeMap) -> None:
        """Refuse what can't be counted."""
        if types.dtype != np.uint8 or types.ndim != 2 or probabilities.shape != (len(self.names), *types.shape):
            raise ValueError(
                f"{len(self.names)} names need probabilities [{len(self.names)}, H, W] and types [H, W] uint8, "
                f"not {probabilities.shape} and {types.shape} {types.dtype}"
            )
        if types.size and types.max() > self.types:
            raise ValueError(f"the truth holds type {types.max()}, but the last of the names is {self.types}")
        _check_probabilities("the defect map", probabilities)

    def merge(self, other: TypeMetrics) -> None:
        """Count all that `other` counted, too."""
        if other.names != self.names:
            raise ValueError(f"{list(other.names)} can't be merged into {list(self.names)}: types are bound by name")
        self.confusion += other.confusion
        for histogram, more in zip(self._histograms, other._histograms, strict=True):
            histogram.counts += more.counts

    def curves(self) -> dict[str, Curve]:
        """For each type that occurs: its pixels against all others, ranked by its probability."""
        curves = zip(self.names[1:], (histogram.curve() for histogram in self._histograms), strict=True)
        return {name: curve for name, curve in curves if curve.positives.any()}

    def accuracy(self) -> float:
        """Share of the true regions whose most probable type is theirs."""
        regions = self.confusion.sum()
        return float(np.trace(self.confusion) / regions) if regions else math.nan


class Evaluation:
    """All metrics of one category. Two halves, counted apart and merged, are the whole."""

    def __init__(self, names: Sequence[str]) -> None:
        self.pixels = PixelMetrics()
        self.images = ImageMetrics()
        self.types = TypeMetrics(names)

    def add(self, probabilities: FloatArray, image_score: float, types: TypeMap) -> None:
        """Count one image: defect map [K+1, H, W], image score in [0, 1], true types [H, W].

        Nothing is counted of an image that is refused.
        """
        self.types.check(probabilities, types)
        mask = types > 0
        self.images.add(image_score, bool(mask.any()))
        self.pixels.add(1 - probabilities[0], mask)
        self.types.add(probabilities, types)

    def add_untyped(self, anomaly: FloatArray, image_score: float, mask: Mask | None) -> None:
        """Count an image whose type has no name here, or without `mask` one of which nobody knows where its defect is.

        `anomaly` and `mask` are [H, W].
        """
        if mask is not None:
            self.pixels.add(anomaly, mask)
        self.images.add(image_score, mask is None or bool(mask.any()))

    def merge(self, other: Evaluation) -> None:
        """Count all that `other` counted, too."""
        self.types.merge(other.types)  # first: it refuses other names
        self.pixels.merge(other.pixels)
        self.images.merge(other.images)

    def summary(self) -> Summary:
        """All metrics of what was counted so far."""
        image, pixel, types = self.images.curve(), self.pixels.curve(), self.types.curves().values()
        return Summary(
            image_auroc=image.auroc(),
            image_ap=image.average_precision(),
            image_f1_max=image.f1_max(),
            pixel_auroc=pixel.auroc(),
            pixel_ap=pixel.average_precision(),
            pixel_f1_max=pixel.f1_max(),
            aupro=self.pixels.aupro(),
            type_pixel_auroc=_mean(curve.auroc() for curve in types),
            type_pixel_ap=_mean(curve.average_precision() for curve in types),
            type_pixel_f1_max=_mean(curve.f1_max() for curve in types),
            type_accuracy=self.types.accuracy(),
            type_chance=1 / self.types.types,
            image_ece=self.images.calibration_error(),
            images=len(self.images.scores),
            defective_images=sum(self.images.defective),
        )


def _check_probabilities(what: str, values: NDArray[Any]) -> None:
    if values.dtype.kind != "f" or not values.size:
        raise ValueError(f"{what} must be floating point and not empty, not {values.dtype} {values.shape}")
    low, high = float(values.min()), float(values.max())  # NaN if any value is
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise BackendError(
            f"{what} must lie in [0, 1], but goes from {low:.6g} to {high:.6g}",
            "Run in fp32, or build the package again: a float type overflowed or the weights are damaged",
        )


def _regions(mask: Mask) -> NDArray[np.int32]:
    """Which 8-connected region each pixel of a mask belongs to: [pixels of the mask], numbered from 0."""
    _, labels = require("cv2").connectedComponents(np.ascontiguousarray(mask).view(np.uint8), connectivity=8)
    return labels[mask] - 1


def _vote(probabilities: FloatArray, mask: Mask) -> NDArray[np.intp]:
    """The most probable type of each region of the mask, [regions] from 0; `probabilities` are [K, H, W]."""
    region = _regions(mask)
    return np.stack([np.bincount(region, channel[mask]) for channel in probabilities]).argmax(axis=0)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
