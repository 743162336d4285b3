"""`profile`: what matrices of a model's shapes take under schemes on this device, as a table that searches read."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.schemes import DENSE, parse_scheme
from dtmsearch.core.widths import Width
from dtmsearch.errors import UserError, reason_of

# A matrix is read from memory in use, not from the cache of the last product: so many bytes of copies, as they are
# stored, take turns; of small matrices not all that.
_BYTES_IN_TURN, _MOST_COPIES = 128 << 20, 256
_LEAST_SECONDS = 0.2  # of a measurement


@dataclass(frozen=True)
class TimedProduct:
    """What a matrix of `outputs` x `inputs` takes under a scheme, in milliseconds: medians over repetitions."""

    scheme: str
    outputs: int
    inputs: int
    decode_ms: float
    prefill_ms: float


@dataclass(frozen=True)
class TimedBlock:
    """What a block of a kind takes beside the products with its matrices, in milliseconds."""

    kind: str
    decode_ms: float
    prefill_ms: float


@dataclass(frozen=True)
class Profile:
    """What `search.times` reads. `left_out`: schemes that no kernel here runs, with the shape where that showed."""

    device: str
    measured_at: str
    prefill_tokens: int
    rows: tuple[TimedProduct, ...]
    left_out: tuple[str, ...] = ()
    blocks: tuple[TimedBlock, ...] = ()

    def content(self) -> dict[str, Any]:
        """The keys of the file."""
        return {
            "device": f"{self.device}, {self.measured_at}",
            "prefill_tokens": self.prefill_tokens,
            "rows": [asdict(row) for row in self.rows],
            "blocks": [asdict(block) for block in self.blocks],
        }


def profile(
    model: str,
    schemes: Sequence[str],
    device: str = "",
    dtype: str = "bfloat16",
    prefill_tokens: int = 512,
    trust_remote_code: bool = ModelSpec.trust_remote_code,
    on_stage: Callable[[str], None] = lambda _: None,
    cuts: Sequence[str] = (),
) -> Profile:
    """Time the products of every shape of a model's components, and of those that `cuts` (widths) leave, and what
    attentions and MLPs take beside. `model` is a folder, a config.json alone, or a hub id;
    no weights are read. `device` is `cpu`, `cuda`, ..., by default a GPU where there is one. Raises `UserError` for a
    scheme, a device or a model that there is not. `on_stage` is told which scheme is timed."""
    import torch

    from dtmsearch.model.modules.block_times import block_times
    from dtmsearch.model.modules.discovery import components_of
    from dtmsearch.model.modules.loading import described_model

    width = getattr(torch, dtype)
    parsed = [parse_scheme(name) for name in dict.fromkeys((DENSE, *schemes))]
    place = _device(device)
    tree = described_model(model, trust_remote_code)
    components = components_of(tree)
    whole = {component.shape for component in components}
    widths = [_width(name) for name in cuts]
    # All MLPs at one width are a rival of every plan that cuts them.
    widths += [replace(w, share=tenths / 10) for w in widths if w.kind == "channels" for tenths in range(1, 10)]
    cut = {width.cut(c) for width in widths for c in components if width.is_of(c) and width.fits(c)}
    shapes = sorted(whole | {shape for shape in cut if all(shape)})
    rows: list[TimedProduct] = []
    left_out = []
    for scheme in parsed:
        on_stage(f"timing {scheme.name} in {len(shapes)} shapes")
        own = {}
        for shape in shapes:
            decode, prefill = (_milliseconds(scheme, shape, width, place, n) for n in (1, prefill_tokens))
            if decode is None or prefill is None:
                left_out.append(f"{scheme.name} of {shape[0]} x {shape[1]}")
                if shape in whole:
                    break
            else:
                own[shape] = TimedProduct(scheme.name, *shape, decode, prefill)
        # Without a row for one of the whole shapes no search can take the scheme, without a cut one's those can that
        # leave the width out.
        rows += own.values() if whole <= own.keys() else []
    if not rows or rows[0].scheme != DENSE:
        raise UserError(f"nothing can be timed here: this device has no product of {dtype} matrices")
    products = {(row.outputs, row.inputs): (row.decode_ms, row.prefill_ms) for row in rows if row.scheme == DENSE}
    on_stage("timing blocks")
    try:
        blocks = block_times(tree, products, prefill_tokens, width, place)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, UserError) as error:
        # A family whose configuration cannot be made shallow: its products are known all the same.
        on_stage(f"what blocks take beside their products cannot be told: {reason_of(error)}")
        blocks = {}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    timed = tuple(TimedBlock(kind, *pair) for kind, pair in blocks.items())
    return Profile(_named(place), today, prefill_tokens, tuple(rows), tuple(left_out), timed)


def _width(name: str) -> Width:
    found = parse_scheme(name).width
    if found is None:
        raise UserError(f"--cut {name!r} is no width: give channels-0.25-wanda, heads-2:3-ziplm-repair, ...")
    return found


def _device(name: str) -> Any:
    import torch

    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return found


def _named(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


def _milliseconds(scheme: Any, shape: tuple[int, int], dtype: Any, device: Any, tokens: int) -> float | None:
    """The median time of a product with so many tokens; None where no kernel here makes it."""
    import torch
    from torch.utils.benchmark import Timer

    from dtmsearch.model.compress.serving_kernels import served
    from dtmsearch.model.modules.block_times import captured

    num_bytes = max(1, int(scheme.stored_bits(shape, 8 * dtype.itemsize)) // 8)
    copies = max(1, min(_MOST_COPIES, _BYTES_IN_TURN // num_bytes))
    try:
        products = [served(scheme, shape, dtype, device) for _ in range(copies)]
        if any(product is None for product in products):
            return None
        inputs = torch.randn((1, tokens, shape[1]), dtype=dtype, device=device)

        def all_in_turn() -> None:
            for product in products:
                assert product is not None
                product(inputs)

        with torch.inference_mode():
            all_in_turn()
            repeat = captured(all_in_turn, device)
            timer = Timer("repeat()", globals={"repeat": repeat}, num_threads=torch.get_num_threads())
            return float(timer.blocked_autorange(min_run_time=_LEAST_SECONDS).median) / copies * 1e3
    except torch.OutOfMemoryError as error:
        raise UserError(f"{scheme.name} of {shape[0]} x {shape[1]} does not fit the device: {error}") from None
    except (RuntimeError, NotImplementedError):  # a kernel that this device or shape lacks
        return None
