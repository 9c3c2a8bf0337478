"""Evaluation of a split: features, metrics of every gallery, FIRM's accuracy per attribute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from easydict import EasyDict
from torch import Tensor
from tqdm import tqdm

from datasets.loaders import ImageLoader, caption_batches, image_loader
from datasets.reading import same_content
from datasets.records import Data
from datasets.samplers import evaluation_batches
from datasets.transforms import normalise
from model.aeafirm import AEAFIRM
from utils.devices import at_least_float32, autocast
from utils.distributed import SINGLE_PROCESS, Processes, shard_sizes
from utils.errors import UserError
from utils.metrics import Ranked, Retrieval, rank_gallery


@dataclass
class Features:
    """Unnormalised float32 features: captions [Q, D], images [G, D] of each view."""

    captions: Tensor
    views: dict[str, Tensor]


def encode_images(model: AEAFIRM, images_BCHW: Tensor) -> Tensor:
    """Unnormalised features [B, D] of images as loaders yield them (bytes)."""
    config = model.base_model.config
    return model.encode_image(normalise(images_BCHW, config.image_mean, config.image_std))


class Evaluator:
    """Evaluates a model on one split, and keeps its loaders between epochs.

    Args:
        data: the data set.
        split: "val", "heldout" or "test".
        views: the views to encode; the first is the paper's gallery (aerial).
        processes: they share the encoding, and all of them get all features.
    """

    def __init__(
        self,
        data: Data,
        split: str,
        args: EasyDict,
        device: torch.device,
        views: tuple[str, ...] | None = None,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.split, self.args, self.device = data.splits[split], args, device
        self.processes = processes
        self.name = split
        self.attribute_names = data.attribute_names
        self.views = {view: self.split.galleries[view] for view in views or data.views}
        self.images = {view: gallery.images for view, gallery in self.views.items()}
        # An image that occurs twice in a gallery is encoded once. Otherwise its features could
        # differ in the last digits, since its places in the batches differ.
        self.rows: dict[str, Tensor] = {}
        self.loaders: dict[str, ImageLoader] = {}
        for view, images in self.images.items():
            paths = [image.path for image in images]
            rows = processes.from_rank_0(same_content(paths) if processes.is_rank_0 else None)
            self.rows[view] = torch.tensor(rows, dtype=torch.long, device=device)
            first_by_row = dict(zip(reversed(rows), reversed(images), strict=True))
            distinct = [first_by_row[row] for row in range(len(first_by_row))]
            self.loaders[view] = image_loader(distinct, args, device, processes)
        self.files = [loader.dataset for loader in self.loaders.values()]
        self.captions = list(caption_batches(self.split.captions, args, processes))

    def check_images(self) -> None:
        """Read every image of this process's shard once. Raises UserError for a broken one: gallery
        images are never skipped, since metrics of a smaller gallery would not be comparable."""
        total = sum(map(len, self.loaders.values()))
        with tqdm(total=total, desc=f"check {self.name}", leave=False, disable=None) as bar:
            for loader in self.loaders.values():
                try:
                    for _ in loader:
                        bar.update()
                except UserError as error:
                    raise UserError(f"{error} Gallery images are never skipped.") from None

    @torch.no_grad()
    def encode(self, model: AEAFIRM, between: Callable[[], object] = lambda: None) -> Features:
        """Features of all captions and images, in order.

        `between` is called after every batch, the same number of times in all processes.
        """
        was_training = model.training
        model.eval()
        lengths = {view: len(loader.dataset) for view, loader in self.loaders.items()}
        lengths["captions"] = len(self.split.captions)
        total = sum(self._shards(length)[0] for length in lengths.values())
        disable = None if self.processes.is_rank_0 else True
        bar = tqdm(total=total, desc=f"encode {self.name}", leave=False, disable=disable)

        def run(name: str, encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Tensor:
            most_batches, counts = self._shards(lengths[name])
            rows, remaining = [], iter(batches)
            for _ in range(most_batches):
                batch = next(remaining, None)
                if batch is not None:
                    with autocast(self.args.precision, self.device):
                        rows.append(encode(batch.to(self.device, non_blocking=True)))
                bar.update()
                between()
            if not rows:  # fewer batches than processes
                width = model.base_model.config.embed_dim
                dtype = at_least_float32(next(model.parameters())).dtype
                rows = [torch.zeros((0, width), device=self.device, dtype=dtype)]
            return self.processes.all_gather({name: torch.cat(rows)}, counts)[name]

        with bar:
            features = Features(
                run("captions", model.encode_text, self.captions),
                {
                    view: run(view, partial(encode_images, model), loader)[self.rows[view]]
                    for view, loader in self.loaders.items()
                },
            )
        model.train(was_training)
        return features

    def _shards(self, count: int) -> tuple[int, list[int]]:
        """For `count` rows: the largest number of batches of a process, and each one's rows."""
        size = self.args.test_batch_size
        most_batches = shard_sizes(-(-count // size), self.processes.size)[0]
        return most_batches, evaluation_batches(count, size, self.processes)[1]

    def evaluate(self, model: AEAFIRM, between: Callable[[], object] = lambda: None) -> Retrieval:
        """Metrics of all captions on the first view's images, as in the paper."""
        sets = self._sets(self.encode(model, between))
        return rank_gallery(*next(iter(sets.values()))).summary()

    def galleries(self, features: Features) -> dict[str, Ranked]:
        """Results of every query on every gallery.

        Galleries: each view, all views together, and the first view of each source with that
        source's captions. A gallery without a match for any caption is left out, except the first.
        """
        sets = self._sets(features)
        return {
            name: rank_gallery(*tensors)
            for name, tensors in sets.items()
            if name == next(iter(sets)) or torch.isin(tensors[2], tensors[3]).any()
        }

    def _sets(self, features: Features) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """By gallery: features of its captions and images, identities of both."""
        split, captions = self.split, features.captions
        caption_pids, caption_sources = (
            torch.tensor(values, device=captions.device)
            for values in (split.caption_pids, split.caption_sources)
        )
        image_pids = {
            v: torch.tensor(g.pids, device=captions.device) for v, g in self.views.items()
        }
        sets = {
            view: (captions, images, caption_pids, image_pids[view])
            for view, images in features.views.items()
        }
        if len(sets) > 1:
            together, pids = (torch.cat(list(x.values())) for x in (features.views, image_pids))
            sets[" + ".join(features.views)] = (captions, together, caption_pids, pids)
        if len(split.sources) > 1:
            view, gallery = next(iter(self.views.items()))
            image_sources = torch.tensor(gallery.sources, device=captions.device)
            for i, source in enumerate(split.sources):
                q, g = caption_sources == i, image_sources == i
                sets[f"{view}, {source}"] = (
                    captions[q], features.views[view][g], caption_pids[q], image_pids[view][g]
                )  # fmt: skip
        return sets

    @torch.no_grad()
    def attribute_accuracy(self, model: AEAFIRM, features: Features) -> dict[str, dict[str, float]]:
        """Percentage of images that FIRM's head classifies correctly: {attribute: {view: %}}.

        The labels are those of training: angle and altitude per image, the five others by a
        majority vote per identity.
        """
        assert model.sentences is not None, "only a model with match2 predicts attributes"
        model.eval()
        columns = model.sentences.columns.tolist()
        names = [self.attribute_names[column] for column in columns]
        table: dict[str, dict[str, float]] = {name: {} for name in names}
        for view, feature_GD in features.views.items():
            if not self.images[view]:
                continue
            labels_GA = torch.tensor([image.attributes for image in self.images[view]])
            predicted_GA = model.predict_attributes(feature_GD).cpu()
            accuracy_A = 100 * (predicted_GA == labels_GA[:, columns]).double().mean(dim=0)
            for name, value in zip(names, accuracy_A.tolist(), strict=True):
                table[name][view] = value
        return table
