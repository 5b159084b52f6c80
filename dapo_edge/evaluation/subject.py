"""What is evaluated: an engine package on one of its backends, or a recipe in eager torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge.backends.base import Backend, MapBatch, backend_class, type_scores
from dapo_edge.backends.host import all_channels
from dapo_edge.config import DefectType, Recipe, load_recipe, packaged_recipe
from dapo_edge.errors import BackendError, RecipeError
from dapo_edge.kernels.map_spec import MapSize, MapSpec
from dapo_edge.package import SUFFIX, EnginePackage, Thresholds
from dapo_edge.runtime.decide import decide, find_regions
from dapo_edge.structures import DefectMap, Inspection, Verdict

if TYPE_CHECKING:
    from dapo_edge.models.method import Method

EAGER = "eager"
SAME_ROWS = 1e-3  # other threads add up in another order; other prompts differ by a hundred times that


class Subject:
    """An opened engine with what a verdict needs. A context manager."""

    def __init__(
        self,
        path: Path,
        backend: Backend,
        spec: MapSpec,
        recipe: Recipe,
        digest: str,
        *,
        thresholds: Thresholds | None = None,
        trained: bool = True,
        map_size: MapSize = "model",
        method: Callable[[], Method],
    ) -> None:
        """`digest` names the content; `method` makes the torch method where other words are asked for."""
        self.path, self.backend, self.spec, self.recipe, self.digest = path, backend, spec, recipe, digest
        self.thresholds, self.trained, self.map_size = thresholds or Thresholds(), trained, map_size
        self._own_bank, self._load_method = backend.bank, method
        self._method: Method | None = None

    @classmethod
    def open(
        cls, path: Path, *, backend: str | None = None, precision: str | None = None, map_size: MapSize | None = None
    ) -> Self:
        """Open a package folder (default backend openvino), or a recipe file (always eager torch, fp32).

        Raises what opening them raises.
        """
        if path.is_dir() or path.suffix == SUFFIX:
            return cls._of_package(EnginePackage.open(path), backend or "openvino", precision, map_size)
        if precision not in (None, "fp32") or backend not in (None, EAGER):
            asked = " ".join(filter(None, (backend, precision)))
            raise RecipeError(f"a recipe is evaluated in eager torch, fp32, not '{asked}'", "Build a package first")
        return cls._of_recipe(path, load_recipe(path), map_size)

    @classmethod
    def _of_package(cls, package: EnginePackage, backend: str, precision: str | None, map_size: MapSize | None) -> Self:
        manifest, size = package.manifest, map_size or package.manifest.map_size
        recipe, digest = packaged_recipe(manifest.recipe), package.digest
        if backend == EAGER:
            from dapo_edge.models.checkpoints import digest_of
            from dapo_edge.models.eager import EagerBackend

            eager = EagerBackend.open(package, map_size=size, precision=precision)
            opened: Backend = eager
            method = eager.method
            # The weights come from the recipe's files, which may have changed since the package was built.
            digest = _digest(package.digest, method.clip.fingerprint, digest_of(method.encoder_tensors()))
        else:
            opened = backend_class(backend).open(package, map_size=size, precision=precision)
        return cls(
            package.path,
            opened,
            manifest.map,
            recipe,
            digest,
            thresholds=package.thresholds(),
            trained=manifest.trained,
            map_size=size,
            method=partial(_method_of, recipe),
        )

    @classmethod
    def _of_recipe(cls, path: Path, recipe: Recipe, map_size: MapSize | None) -> Self:
        from dapo_edge.engine.build import map_spec
        from dapo_edge.models.checkpoints import digest_of
        from dapo_edge.models.eager import EagerBackend

        method = _method_of(recipe)
        bank = method.bank(recipe.prompts.defects, recipe.prompts.object)
        spec, size = map_spec(recipe, method), map_size or recipe.map.size
        backend = EagerBackend(method, bank, spec, size)
        weights = [digest_of(method.encoder_tensors()), bank.digest]
        digest = _digest(recipe.model_dump(mode="json"), method.clip.fingerprint, *weights)
        return cls(path, backend, spec, recipe, digest, map_size=size, method=lambda: method)

    @property
    def decides(self) -> bool:
        """Whether its verdicts can be anything but `unsure` with the words in use."""
        limits = self.thresholds.for_bank(self.backend.bank)
        return self.trained and limits.image is not None and limits.pixel is not None

    @property
    def names(self) -> tuple[str, ...]:
        """Normal, then the words that the map has channels for."""
        return self.backend.bank.names

    @property
    def identity(self) -> str:
        """Two subjects of one identity give the same results."""
        bank = self.backend.bank.digest
        return _digest(self.digest, self.backend.name, self.backend.precision, bank, str(self.map_size))

    def use_words(self, words: Sequence[str] | None) -> None:
        """Compare with other words from the next image on, or with `None` with its own again."""
        if words is None:
            self.backend.set_bank(self._own_bank)
            return
        if self._method is None:
            self._method = self._load_method()
            self._check_method(self._method)
        bank = self._method.bank([DefectType(name=word, phrase=word) for word in words], self.recipe.prompts.object)
        self.backend.set_bank(bank)

    def _check_method(self, method: Method) -> None:
        """New words have to come from the very prompts that the package's own came from."""
        own = method.bank(self.recipe.prompts.defects, self.recipe.prompts.object)
        known = self._own_bank
        is_other = own.names != known.names or own.rows.shape != known.rows.shape
        if is_other or np.abs(own.rows - known.rows).max() > SAME_ROWS:
            files = f"'{self.recipe.prompts.tuned}' or the backbone" if self.recipe.prompts.tuned else "the backbone"
            raise RecipeError(
                f"{files} is not what '{self.path}' was built with",
                "Build the package again, or evaluate it with --words own",
            )

    def infer(self, image: NDArray[np.uint8]) -> MapBatch:
        """One image [H, W, 3] BGR. Raises `BackendError` where the engine's values are no numbers."""
        batch = self.backend.infer([image])
        if not (np.isfinite(batch.anomaly).all() and np.isfinite(batch.image_scores).all()):
            raise BackendError(
                f"the engine returned values that are not numbers ({self.backend.name}, {self.backend.precision})",
                "Run in fp32, or build the package again: a float type overflowed or the weights are damaged",
            )
        return batch

    def channels(self, batch: MapBatch) -> NDArray[np.float32]:
        """The whole defect map [K+1, H, W] of one image; its row 0 is what the engine itself gave."""
        height, width = batch.anomaly.shape[1:]
        maps = all_channels(batch.patch_probs, self.spec, (width, height))[0]
        maps[0] = 1 - batch.anomaly[0]
        return maps

    def verdict(self, batch: MapBatch) -> Verdict:
        """As the line would decide."""
        if not self.trained:
            return "unsure"
        limits = self.thresholds.for_bank(batch.bank)
        return decide(float(batch.image_scores[0]), float(batch.anomaly[0].max()), limits)

    def inspection(self, image: NDArray[np.uint8]) -> Inspection:
        """One image with its regions, to be drawn."""
        batch = self.infer(image)
        limit = self.thresholds.for_bank(batch.bank).pixel
        size, anomaly = (image.shape[1], image.shape[0]), batch.anomaly[0]
        regions = (
            find_regions(anomaly, batch.patch_probs[0], batch.bank.names, self.spec, limit.value, size) if limit else ()
        )
        found = DefectMap(anomaly, batch.types[0], batch.bank.names)
        score, verdict = float(batch.image_scores[0]), self.verdict(batch)
        highest = limit.value if limit else None
        return Inspection(score, verdict, found, regions, size, highest, type_scores=type_scores(batch))

    def as_json(self) -> dict[str, Any]:
        """What it is."""
        limits = self.thresholds
        return {
            "path": str(self.path),
            "name": self.recipe.name,
            "method": self.recipe.method,
            "digest": self.digest,
            "backend": self.backend.name,
            "precision": self.backend.precision,
            "device": self.backend.device,
            "map_size": self.map_size,
            "score": self.spec.score,
            "trained": self.trained,
            "thresholds": {
                "image": limits.image and limits.image.value,
                "pixel": limits.pixel and limits.pixel.value,
            },
        }

    def close(self) -> None:
        """Free the engine."""
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _method_of(recipe: Recipe) -> Method:
    from dapo_edge.models.method import method_of

    return method_of(recipe)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
