"""A base checkpoint without what a plan drops and cuts, which formats are written from: real layers fewer, real tensors
fewer and smaller.

Layers of which nothing is left go, and those above move down: an ordinary checkpoint of fewer `num_hidden_layers`, with
every list that its configuration has of layers cut. Single attention and MLP blocks have no place in an ordinary
configuration: their tensors go, and a small file of code beside the weights builds the model without them. Its
configuration bears a `model_type` of its own, so that nothing that ignores the file loads it as the base model's family
with random weights in their places. One width of all layers is said by an ordinary configuration; of several, the same
file makes the matrices smaller.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.plan import Plan, cut_by
from dtmsearch.core.plan_widths import is_even, widths_left
from dtmsearch.core.widths import side_of
from dtmsearch.errors import UserError
from dtmsearch.export.cut_matrices import CutMatrix, tensors_of_cut, what_stays
from dtmsearch.export.job import Job
from dtmsearch.export.renamed_compressor import RenamedCompressor
from dtmsearch.export.smaller_code import CODE_FILE, TYPE_ENDING, code_of
from dtmsearch.export.smaller_experts import MixtureTensors, SmallerMixture, numbers_in, smaller_mixtures
from dtmsearch.export.writer import ShardWriter, copy_other_files
from dtmsearch.model.modules.blocks import returned_kind
from dtmsearch.model.modules.discovery import find_layers
from dtmsearch.model.modules.loading import empty_model, takes_settings
from dtmsearch.model.modules.usage import usage_of

# What families whose blocks add their output to an argument themselves call it (BLOOM, MPT).
_RESIDUAL = "residual"


def dropped_blocks(plan: Plan, manifest: ModelManifest) -> list[str]:
    """The blocks and layers that a plan drops."""
    return sorted(name for name in plan.dropped if manifest.by_name[name].is_block)


def single_blocks(plan: Plan, manifest: ModelManifest) -> list[str]:
    """Those of them that a plan drops of layers of which something is left, and those that it cuts where layers are of
    several widths."""
    left = {c.layer for c in manifest.components if not plan.drops(c.name)}
    cut = [] if is_even(plan, manifest.components) else sorted(plan.widths)
    return [*(name for name in dropped_blocks(plan, manifest) if manifest.by_name[name].layer in left), *cut]


@contextmanager
def without_dropped(job: Job, beside: Path) -> Iterator[Job]:
    """Within, the job over a checkpoint without the blocks and layers that its plan drops, and with those cut that it
    cuts, by the names that their neighbours have there; the job itself where it does neither. The checkpoint lies in a
    folder `beside` the export's own while that is written, where there must be room for both. Raises `UserError` for a
    model whose configuration does not say it."""
    if not (dropped_blocks(job.plan, job.manifest) or job.plan.widths):
        yield job
        return
    shape = _Shape(job)
    if job.fuses and shape.in_code:
        raise UserError(
            f"{job.runtime} runs no model that takes a file of code: the configuration of {job.manifest.model} has no "
            "numbers for what this plan drops and cuts. Export for transformers, or give one width that it can say"
        )
    with tempfile.TemporaryDirectory(prefix=f"{beside.name}-smaller-", dir=beside.parent) as scratch:
        folder = Path(scratch)
        shape.write(folder)
        yield shape.job(folder)


class _Shape:
    """What is left of a job's model: `kept` layers by their numbers before, single blocks that are `out`, by their
    names afterwards, and matrices that are `cut`, by their names before. `in_code`: the configuration alone does not
    say it."""

    def __init__(self, job: Job) -> None:
        self._job, plan = job, job.plan
        self._model: Any = job.empty
        self.layers_name = find_layers(self._model)[0]
        inside: dict[int, list[Component]] = {}
        for component in job.manifest.components:
            inside.setdefault(component.layer, []).append(component)
        gone = {layer for layer, own in inside.items() if all(plan.drops(c.name) for c in own)}
        self.kept = [layer for layer in range(job.manifest.num_layers) if layer not in gone]
        if not self.kept:
            raise UserError("the plan drops every layer, and nothing would be left to export")
        self._place = {layer: at for at, layer in enumerate(self.kept)}
        blocks = [job.manifest.by_name[name] for name in dropped_blocks(plan, job.manifest)]
        self.out = {self.renamed(b.name): b for b in blocks if b.layer in self._place and b.kind != "layer"}
        first = job.manifest.components[0]
        tensor = next(iter(job.tensors_of(first.name)), f"{first.name}.weight")
        self._in_files = tensor.split(f".{first.layer}.")[0]
        self.mixtures = smaller_mixtures(job)
        self._of_mixtures = MixtureTensors(job, self.mixtures)
        self.cut = {
            c.name: CutMatrix(c, *what_stays(job, c))
            for c in job.manifest.components
            if plan.width_of(c) is not None and c.block not in self.mixtures
        }
        self._cut_tensors = {name: cut for cut in self.cut.values() for name in tensors_of_cut(job, cut.matrix)}
        self._even = self._even_config() if is_even(plan, job.manifest.components) else None
        self.in_code = bool(self.out) or (bool(self.cut or self.mixtures) and self._even is None)

    def renamed(self, name: str, layers: str = "") -> str:
        """A module's or a tensor's name once the layers below it are fewer."""
        layers = layers or self.layers_name
        if not name.startswith(f"{layers}."):
            return name
        number, dot, rest = name[len(layers) + 1 :].partition(".")
        return f"{layers}.{self._place[int(number)]}{dot}{rest}"

    def _stays(self, tensor: str) -> bool:
        if not tensor.startswith(f"{self._in_files}."):
            return True
        number, _, rest = tensor[len(self._in_files) + 1 :].partition(".")
        module = f"{self.layers_name}.{number}.{rest}"
        return int(number) in self._place and not any(module.startswith(f"{b.name}.") for b in self.out.values())

    def write(self, folder: Path) -> None:
        """The smaller checkpoint."""
        config = self._config()
        if self.in_code:
            config = self._with_code(config, folder)
        writer = ShardWriter(folder, self._job)
        for name in self._job.shapes:
            named = self._of_mixtures.named(name)
            if self._stays(name) and named is not None:
                tensor, cut = self._of_mixtures.of(name, self._job.read(name)), self._cut_tensors.get(name)
                writer.add(self.renamed(named, self._in_files), tensor if cut is None else cut.of(name, tensor))
        writer.close()
        copy_other_files(self._job, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self._check(folder)

    def job(self, folder: Path) -> Job:
        """The job over it."""
        job, plan = self._job, self._job.plan
        # As each is named where its number among experts is another, and before.
        left = [
            (numbered, c)
            for c in job.manifest.components
            if not plan.drops(c.name) and (numbered := self._in_mixture(c)) is not None
        ]
        others = [c for c in job.manifest.others if c.layer not in self._gone(c) and not plan.drops(c.name)]
        base = {self.renamed(c.name): own.name for c, own in (*left, *zip(others, others, strict=True))}

        def moved(component: Component) -> Component:
            layer = self._place.get(component.layer, component.layer)
            if component.layer >= job.manifest.num_layers:
                layer = len(self.kept)
            component = component if component.block in self.mixtures else cut_by(plan, component)
            return replace(component, name=self.renamed(component.name), layer=layer,
                           mixture=component.mixture and self.renamed(component.mixture))  # fmt: skip

        routers = [name for name in job.manifest.routers if not plan.drops(name)]
        manifest = replace(
            job.manifest,
            num_layers=len(self.kept),
            components=tuple(moved(component) for component, _ in left),
            others=tuple(moved(self._as_left(component)) for component in others),
            routers=tuple(self.renamed(name) for name in routers),
        )
        blocks = {*dropped_blocks(plan, job.manifest), *plan.widths}
        columns = {name: cut.at for name, cut in self.cut.items() if side_of(cut.matrix) == "cols"}
        names = {own.name: component.name for component, own in left} | {c.name: c.name for c in others}
        schemes = {self.renamed(names[n]): scheme for n, scheme in plan.entries if n not in blocks and n in names}
        return replace(
            job,
            folder=folder,
            manifest=manifest,
            plan=Plan.of(schemes),
            compressor=RenamedCompressor(job.compressor, base, columns, frozenset(self.cut)),
            trained=None,  # they are in the folder
            trust_remote_code=job.trust_remote_code or self.in_code,
        )

    def _in_mixture(self, component: Component) -> Component | None:
        """A component by its number among the experts that stay; None where its expert goes."""
        mixture = self.mixtures.get(component.block) if component.mixture else None
        return component if mixture is None else mixture.moved(component)

    def _as_left(self, component: Component) -> Component:
        """A router by the rows that it has afterwards."""
        mixture = self.mixtures.get(component.block)
        routers = () if mixture is None else [t.module for t in mixture.parts.tensors if t.is_router]
        if mixture is None or component.name.removeprefix(f"{component.block}.") not in routers:
            return component
        return replace(component, shape=(len(mixture.kept), component.shape[1]))

    def _gone(self, component: Component) -> set[int]:
        return set(range(self._job.manifest.num_layers)) - set(self.kept)

    def _config(self) -> dict[str, Any]:
        """The base model's configuration with fewer layers: their number, and every list of as many."""
        config: dict[str, Any] = json.loads((self._job.folder / "config.json").read_text(encoding="utf-8"))
        own: Any = self._model.config
        text = own.get_text_config()
        part = config if text is own else next((v for v in config.values() if _is_part(v, text)), config)
        before = self._job.manifest.num_layers
        number = (getattr(text, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers")
        part[number] = len(self.kept)
        for key, value in text.to_dict().items():
            if isinstance(value, list) and len(value) == before:
                part[key] = [value[layer] for layer in self.kept]
        part.update({} if self._even is None else self._even)
        config["dtype"] = str(self._job.dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
        config.pop("transformers_weights", None)
        return config

    def _even_config(self) -> dict[str, int] | None:
        """What a configuration says of one width of all layers; None where the family's has no name for it, or does not
        take such numbers."""
        text: Any = self._model.config.get_text_config()
        found: dict[str, int] = {}
        for kind, layers in widths_left(self._job.plan, self._job.manifest.components).items():
            ((left, whole),) = set(layers.values())
            if kind == "experts":
                numbers = numbers_in(text, whole, left)
                if not numbers:
                    return None
                found |= numbers
            elif kind == "channels":
                names = [name for name in _CHANNELS if getattr(text, name, None) == whole]
                if not names:
                    return None
                found[(getattr(text, "attribute_map", None) or {}).get(names[0], names[0])] = left
            else:
                heads, keys = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
                if keys is None or keys * left % whole or heads * left % whole:
                    return None
                each = getattr(text, "head_dim", None) or text.hidden_size // heads
                found |= {
                    "num_attention_heads": heads * left // whole,
                    "num_key_value_heads": keys * left // whole,
                    "head_dim": each,
                }
        return found if takes_settings(text, found) else None

    def _check(self, folder: Path) -> None:
        """Raises `UserError` unless the model that the smaller configuration builds has, layer by layer, what those had
        that it keeps: its family may say by a number, of every so many, what its layers are."""
        spec = ModelSpec(str(folder), dtype="float32", trust_remote_code=self._job.trust_remote_code or self.in_code)
        before, after = find_layers(self._model)[1], find_layers(empty_model(folder, spec))[1]
        for at, layer in enumerate(self.kept):
            out = {name.removeprefix(f"{self.layers_name}.{at}.") for name in self.out}
            place = f"{self.layers_name}.{layer}."
            cut = {n.removeprefix(place): c for n, c in self.cut.items() if n.startswith(place)}
            mixtures = {n.removeprefix(place): m for n, m in self.mixtures.items() if n.startswith(place)}
            own = _described(before[layer], out, cut, mixtures, before=True)
            made = _described(after[at], out, cut)
            if own != made:
                what = next(iter(sorted(set(own.items()) ^ set(made.items()), key=str)))[0]
                raise UserError(
                    f"{self._job.manifest.model} cannot be exported without some of its layers: its configuration "
                    f"would make of layer {layer}, as layer {at}, one of another {what}"
                )

    def _with_code(self, config: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The configuration of a model that a file of code builds, which is written."""
        kind, own = type(self._model), type(self._model.config)
        if config.get("auto_map") or not kind.__module__.startswith("transformers."):
            raise UserError(
                f"{self._job.manifest.model} runs code of its own, beside which none is written that leaves out or "
                f"cuts {next(iter((*(b.name for b in self.out.values()), *self.cut, *self.mixtures)))}; drop whole "
                "layers "
                "(search.drop: [layer])"
            )
        manners = self._manners() if self.out else {}
        cut = {self.renamed(name): list(each.shape) for name, each in self.cut.items() if self._even is None}
        left_out = {name: [block.kind, *manners[block.name]] for name, block in self.out.items()}
        (folder / CODE_FILE).write_text(code_of(kind.__name__, own.__name__, own.model_type), encoding="utf-8")
        module = CODE_FILE.removesuffix(".py")
        return config | {
            "model_type": own.model_type + TYPE_ENDING,
            "architectures": ["WithoutBlocks"],
            "auto_map": {
                "AutoConfig": f"{module}.WithoutBlocksConfig",
                "AutoModelForCausalLM": f"{module}.WithoutBlocks",
            },
            "left_out": left_out,
            "cut": cut,
            "fewer_experts": {}
            if self._even is not None
            else {self.renamed(name): self._numbers_of(mixture) for name, mixture in self.mixtures.items()},
        }

    def _numbers_of(self, mixture: SmallerMixture) -> dict[str, Any]:
        """What the file of code is told of a mixture: shapes of parameters and buffers, and the numbers of modules."""
        held = self._model.get_submodule(mixture.block.name).state_dict()
        tensors = {t.path: list(mixture.shape_of(t, tuple(held[t.path].shape))) for t in mixture.parts.tensors}
        return {"tensors": tensors, "numbers": [[*number, len(mixture.kept)] for number in mixture.parts.numbers]}

    def _manners(self) -> dict[str, tuple[int, int | str | None]]:
        """How many values each block returns, 0 where it is a tensor by itself, and which argument it adds its output
        to (position or name), None where its layer does that: by running the model without values. What adds to an
        argument is told by the argument's name, for there are no values to compare."""
        found: dict[str, tuple[int, int | str | None]] = {}

        def noting(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                kind = returned_kind(output)
                names = list(inspect.signature(module.forward).parameters)
                at = names.index(_RESIDUAL) if _RESIDUAL in names else None
                residual = at if at is not None and at < len(args) else _RESIDUAL if _RESIDUAL in kwargs else None
                found[name] = (0 if kind is None else kind[1]), residual

            return note

        blocks = [block.name for block in self.out.values()]
        hooks = [
            self._model.get_submodule(name).register_forward_hook(noting(name), with_kwargs=True) for name in blocks
        ]
        try:
            failed = usage_of(self._model).failed
        finally:
            for hook in hooks:
                hook.remove()
        if missing := [name for name in blocks if name not in found]:
            raise UserError(f"how {missing[0]} returns what it makes cannot be told: {failed}")
        return found


def _is_part(value: Any, text: Any) -> bool:
    return isinstance(value, dict) and value.get("model_type") == text.model_type


def _described(
    layer: nn.Module,
    out: set[str],
    cut: Mapping[str, CutMatrix],
    mixtures: Mapping[str, SmallerMixture] = MappingProxyType({}),
    before: bool = False,
) -> dict[str, str]:
    """A layer by its modules, their simple attributes and the shapes of their weights, but for blocks that are out and
    numbers in what is cut; `before` it is cut, and has lost experts of `mixtures`, as it will be."""
    shapes_left, numbers_left = _left_in(layer, mixtures)
    blocks = {name.rpartition(".")[0] for name in cut}
    found: dict[str, str] = {}
    for name, module in layer.named_modules():
        if any(name == block or name.startswith(f"{block}.") for block in out):
            continue
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, str | int | float | bool) and not key.startswith("_") and key not in _NUMBERS
        }
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        if name in blocks or name in cut:
            plain = {key: value for key, value in plain.items() if isinstance(value, str | bool)}
        if before and name in cut:
            shapes = {key: cut[name].shape_of(key, shape) for key, shape in shapes.items()}
        shapes = {key: shapes_left.get((name, key), shape) for key, shape in shapes.items()}
        plain = {key: numbers_left.get((name, key), value) for key, value in plain.items()}
        found[name or "class"] = f"{type(module).__name__} {sorted(plain.items())} {sorted(shapes.items())}"
    return found


def _left_in(
    layer: nn.Module, mixtures: Mapping[str, SmallerMixture]
) -> tuple[dict[tuple[str, str], tuple[int, ...]], dict[tuple[str, str], int]]:
    """Shapes and numbers of a layer's modules that mixtures of fewer experts change, by module and name."""
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    numbers: dict[tuple[str, str], int] = {}
    for block, mixture in mixtures.items():
        held = layer.get_submodule(block).state_dict()
        for tensor in mixture.parts.tensors:
            module = f"{block}.{tensor.module}".rstrip(".")
            shapes[module, tensor.name] = mixture.shape_of(tensor, tuple(held[tensor.path].shape))
        for path, attribute in mixture.parts.numbers:
            numbers[f"{block}.{path}".rstrip("."), attribute] = len(mixture.kept)
    return shapes, numbers


# A layer's own number.
_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")


# What families call the channels of an MLP in their configurations.
_CHANNELS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "feed_forward_size")
