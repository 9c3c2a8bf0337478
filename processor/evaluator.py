"""Features of a split, then its metrics: per gallery, and FIRM's accuracy per attribute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from easydict import EasyDict
from prettytable import PrettyTable
from torch import Tensor
from tqdm import tqdm

from datasets.files import same_content
from datasets.loaders import ImageLoader, caption_batches, image_loader
from datasets.records import Data
from datasets.samplers import evaluation_batches
from datasets.transforms import normalise
from model.aeafirm import AEAFIRM
from utils.devices import at_least_float32, autocast
from utils.distributed import SINGLE_PROCESS, Processes, shard_sizes
from utils.errors import UserError
from utils.metrics import METRICS, Ranked, Retrieval, rank
from utils.text import visible
from utils.uncertainty import bootstrap


@dataclass
class Features:
    """Unnormalised float32 features: captions [Q, D], images [G, D] of each view."""

    captions: Tensor
    views: dict[str, Tensor]


def encode_images(model: AEAFIRM, images_BCHW: Tensor) -> Tensor:
    """Unnormalised features [B, D] of bytes, as loaders give them."""
    config = model.base_model.config
    return model.encode_image(normalise(images_BCHW, config.image_mean, config.image_std))


class Evaluator:
    """Evaluates a model on one split; keeps its loaders between epochs.

    Args:
        data: the data set.
        split: "val" or "test".
        views: which views to encode; the first is the paper's gallery (aerial).
        processes: processes share the encoding; all of them get all features.
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
        # A picture that stands in a gallery more than once is encoded once: so it has one feature,
        # whatever kernels make of its place in a batch.
        self.rows: dict[str, Tensor] = {}
        self.loaders: dict[str, ImageLoader] = {}
        for view, images in self.images.items():
            paths = [image.path for image in images]
            rows = processes.from_rank_0(same_content(paths) if processes.is_rank_0 else None)
            self.rows[view] = torch.tensor(rows, dtype=torch.long, device=device)
            first = dict(zip(reversed(rows), reversed(images), strict=True))
            distinct = [first[row] for row in range(len(first))]
            self.loaders[view] = image_loader(distinct, args, device, processes)
        self.files = [loader.dataset for loader in self.loaders.values()]
        self.captions = list(caption_batches(self.split.captions, args, processes))

    def check_images(self) -> None:
        """Read every image of this process's share once. Raises UserError for a broken one: of a
        gallery none is skipped, since metrics of a smaller gallery would not compare."""
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

        `between` is called after every batch, equally often by all processes.
        """
        was_training = model.training
        model.eval()
        lengths = {view: len(loader.dataset) for view, loader in self.loaders.items()}
        lengths["captions"] = len(self.split.captions)
        steps = sum(self._shared(length)[0] for length in lengths.values())
        hidden = None if self.processes.is_rank_0 else True
        bar = tqdm(total=steps, desc=f"encode {self.name}", leave=False, disable=hidden)

        def run(name: str, encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Tensor:
            most, counts = self._shared(lengths[name])
            rows, waiting = [], iter(batches)
            for _ in range(most):
                batch = next(waiting, None)
                if batch is not None:
                    with autocast(self.args.precision, self.device):
                        rows.append(encode(batch.to(self.device, non_blocking=True)))
                bar.update()
                between()
            if not rows:  # fewer batches than processes
                width, dtype = (
                    model.base_model.config.embed_dim,
                    at_least_float32(next(model.parameters())).dtype,
                )
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

    def _shared(self, count: int) -> tuple[int, list[int]]:
        """Most batches of any process for a list, and each one's rows."""
        size = self.args.test_batch_size
        return shard_sizes(-(-count // size), self.processes.size)[0], evaluation_batches(
            count, size, self.processes
        )[1]

    def evaluate(self, model: AEAFIRM, between: Callable[[], object] = lambda: None) -> Retrieval:
        """All captions against the first view's images: the paper's metrics."""
        return next(iter(self.galleries(self.encode(model, between)).values())).summary()

    def galleries(self, features: Features) -> dict[str, Ranked]:
        """Results of every query on every gallery there is.

        Each view, all views together, and the first view of each source with that source's
        captions. A gallery in which no caption has a match is left out, unless it is the first.
        """
        split, captions = self.split, features.captions
        caption_pids, from_q = (
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
            from_g = torch.tensor(gallery.sources, device=captions.device)
            for i, source in enumerate(split.sources):
                q, g = from_q == i, from_g == i
                sets[f"{view}, {source}"] = (
                    captions[q], features.views[view][g], caption_pids[q], image_pids[view][g]
                )  # fmt: skip
        return {
            name: rank(*tensors)
            for name, tensors in sets.items()
            if name == next(iter(sets)) or torch.isin(tensors[2], tensors[3]).any()
        }

    @torch.no_grad()
    def attribute_accuracy(self, model: AEAFIRM, features: Features) -> dict[str, dict[str, float]]:
        """Percent of images whose attribute FIRM's head names rightly: {attribute: {view: %}}.

        The labels are those of training: five voted per identity, angle and altitude per image.
        """
        assert model.sentences is not None, "only a model with match2 names attributes"
        model.eval()
        columns = model.sentences.columns.tolist()
        names = [self.attribute_names[column] for column in columns]
        table: dict[str, dict[str, float]] = {name: {} for name in names}
        for view, feature_GD in features.views.items():
            if not self.images[view]:
                continue
            labels_GA = torch.tensor([image.attributes for image in self.images[view]])
            guess_GA = model.predict_attributes(feature_GD).cpu()
            accuracy_A = 100 * (guess_GA == labels_GA[:, columns]).double().mean(dim=0)
            for name, value in zip(names, accuracy_A.tolist(), strict=True):
                table[name][view] = value
        return table


def gallery_table(galleries: dict[str, Retrieval]) -> str:
    """The galleries' metrics in percent, a row each."""
    table = PrettyTable(["gallery", "queries", "images", *METRICS])
    table.align = "r"
    table.align["gallery"] = "l"
    for name, r in galleries.items():
        shown = [f"{value:.2f}" for value in r.metrics.values()]
        table.add_row([name, r.queries, r.gallery, *shown])
    lines = [table.get_string()]
    lines += [
        f"{name}: {r.unmatched} captions have no image of their identity and are left out"
        for name, r in galleries.items()
        if r.unmatched
    ]
    return "\n".join(lines)


def intervals(ranked: Ranked, draws: int, seed: int) -> dict[str, list[float]]:
    """95 % interval of each metric of a gallery, bootstrapped over identities."""
    low, high = bootstrap(ranked.percentages(), ranked.pids_Q, draws, seed).tolist()
    return {name: [a, b] for name, a, b in zip(METRICS, low, high, strict=True)}


def interval_table(galleries: dict[str, dict[str, list[float]]]) -> str:
    """The intervals, a gallery a row."""
    table = PrettyTable(["gallery", *METRICS])
    table.align = "r"
    table.align["gallery"] = "l"
    for name, found in galleries.items():
        table.add_row([name, *(f"{low:.2f} to {high:.2f}" for low, high in found.values())])
    return table.get_string()


def attribute_table(accuracy: dict[str, dict[str, float]]) -> str:
    """Accuracy in percent, an attribute a row, a view a column."""
    views = list(next(iter(accuracy.values())))
    table = PrettyTable(["attribute", *views])
    table.align = "r"
    table.align["attribute"] = "l"
    for name, row in accuracy.items():
        table.add_row([visible(name), *(f"{row[view]:.2f}" for view in views)])
    return table.get_string()
