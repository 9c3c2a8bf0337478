"""Evaluation of a split: features, metrics of every gallery, FIRM's accuracy per attribute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from processor.feature_files import FeatureFiles
from utils.devices import at_least_float32, autocast
from utils.distributed import SINGLE_PROCESS, Processes, shard_sizes
from utils.errors import UserError
from utils.files import file_hash
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
        self.name, self.root = split, data.root
        self.attribute_names = data.attribute_names
        self.views = {view: self.split.galleries[view] for view in views or data.views}
        self.images = {view: gallery.images for view, gallery in self.views.items()}
        self.image_views = data.image_views
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

        def run(name: str, batches: Iterable[Tensor]) -> Tensor:
            most_batches, counts = self._shards(lengths[name])
            rows, remaining = [self._no_features(model)], iter(batches)
            for _ in range(most_batches):
                batch = next(remaining, None)
                if batch is not None:
                    rows.append(self._encode(model, name, batch))
                bar.update()
                between()
            return self.processes.all_gather({name: torch.cat(rows)}, counts)[name]

        with bar:
            features = Features(
                run("captions", self.captions),
                {view: run(view, loader)[self.rows[view]] for view, loader in self.loaders.items()},
            )
        model.train(was_training)
        return features

    @torch.no_grad()
    def encode_into(self, folder: Path, model: AEAFIRM, checkpoint: Path) -> Features:
        """As `encode`, bit for bit, but through files in a folder (processor/feature_files.py).

        Only shards that it lacks are encoded. Each process encodes some of them and writes them to
        disk, one after the other. Raises UserError as `FeatureFiles` does.

        Args:
            checkpoint: the file of the model.
        """
        model.eval()
        names = ("img_size", "stride_size", "text_length", "precision", "test_batch_size")
        about = {name: self.args[name] for name in names} | {"device": self.device.type}
        about["checkpoint"] = file_hash(checkpoint) if self.processes.is_rank_0 else ""
        paths = {view: loader.dataset.paths for view, loader in self.loaders.items()}
        size = self.args.test_batch_size
        files = FeatureFiles(
            folder / self.name, about, self.split.captions, paths, self.root, size, self.processes
        )
        mine = {
            n: files.missing(n)[self.processes.rank :: self.processes.size] for n in files.lists
        }
        bar = tqdm(
            total=sum(map(len, mine.values())), unit="shard", desc=f"encode {self.name}",
            leave=False, disable=None if self.processes.is_rank_0 else True,
        )  # fmt: skip
        with bar:
            for name, shards in mine.items():
                positions = [files.positions(name, shard) for shard in shards]
                batches = iter(self._batches_at(name, positions))
                for shard, rows in zip(shards, positions, strict=True):
                    parts = [next(batches) for _ in range(0, len(rows), size)]
                    features = [self._encode(model, name, part) for part in parts]
                    files.write(name, shard, torch.cat(features))
                    bar.update()
        self.processes.barrier()
        empty = self._no_features(model)
        views = {view: files.read(view, empty)[self.rows[view]] for view in self.views}
        return Features(files.read("captions", empty), views)

    def _batches_at(self, name: str, positions: Sequence[range]) -> Iterable[Tensor]:
        """Batches of "captions", or of images of a view, at these positions."""
        size = self.args.test_batch_size
        rows = [row for some in positions for row in some]
        if name == "captions":
            return caption_batches([self.split.captions[row] for row in rows], self.args)
        loader = self.loaders[name]
        return ImageLoader(
            loader.dataset,
            batch_sampler=[rows[i : i + size] for i in range(0, len(rows), size)],
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            generator=torch.Generator(),
        )

    def _encode(self, model: AEAFIRM, name: str, batch: Tensor) -> Tensor:
        """Features of a batch of "captions", or of images of a view."""
        encode = model.encode_text if name == "captions" else partial(encode_images, model)
        with autocast(self.args.precision, self.device):
            return encode(batch.to(self.device, non_blocking=True))

    def _no_features(self, model: AEAFIRM) -> Tensor:
        """[0, D], of the type of the model's features."""
        dtype = at_least_float32(next(model.parameters())).dtype
        return torch.zeros((0, model.feature_dim), device=self.device, dtype=dtype)

    def _shards(self, count: int) -> tuple[int, list[int]]:
        """For `count` rows: the largest number of batches of a process, and each one's rows."""
        size = self.args.test_batch_size
        most_batches = shard_sizes(-(-count // size), self.processes.size)[0]
        return most_batches, evaluation_batches(count, size, self.processes)[1]

    def evaluate(self, model: AEAFIRM, between: Callable[[], object] = lambda: None) -> Retrieval:
        """Metrics of all captions on the first view's images, as in the paper."""
        sets = self._sets(self.encode(model, between))
        return rank_gallery(*next(iter(sets.values()))).summary()

    def galleries(
        self, features: Features, rank: Callable[..., Ranked] = rank_gallery
    ) -> dict[str, Ranked]:
        """Results of every query on every gallery.

        Galleries: each view, all views together, and the first view of each source with that
        source's captions; of a gallery with images of both views, also those of each view if they
        are known. A gallery without a match for any caption is left out, except the first.
        """
        sets = self._sets(features)
        return {
            name: rank(*tensors)
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
        view, gallery = next(iter(self.views.items()))
        known = [self.image_views.get(image.path, "") for image in gallery.images]
        for one in sorted({*known} - {""}):
            g = torch.tensor([of_image == one for of_image in known], device=captions.device)
            sets[one] = (captions, features.views[view][g], caption_pids, image_pids[view][g])
        if len(split.sources) > 1:
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
