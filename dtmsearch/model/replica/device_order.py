"""In which order requests keep all devices of a model busy that lies over several of them. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def busy_order(first_layers: Sequence[int], ends: Sequence[int], head: float = 0.0) -> list[int]:
    """The positions of requests in the order in which they are best launched: layers run from `first_layers[i]` upward
    for request i, and device d holds those below `ends[d]` and from `ends[d - 1]` on, the last one also the head, which
    takes as long as `head` layers.

    A device does what it is given in the order in which it is given, and a request is given to all of its devices when
    it is launched. So one that begins high, which the lower devices never see, has to be launched while another is
    still on its way through these. Always next is what leaves the least work for the device that is done last, then
    what lets devices wait least, then what keeps them closest to each other. (A flow shop of fixed order; for two
    devices Johnson's rule, 1954, is optimal, but lets the queue of the second grow without bounds.)
    """
    waiting: dict[int, list[int]] = {}  # by first layer
    for position, layer in enumerate(first_layers):
        waiting.setdefault(layer, []).append(position)
    starts = [0, *ends[:-1]]
    work = {
        layer: [float(max(0, end - max(layer, start))) for start, end in zip(starts, ends, strict=True)]
        for layer in waiting
    }
    for own in work.values():
        own[-1] += head
    left = [sum(work[layer][device] for layer in first_layers) for device in range(len(ends))]
    free = [0.0] * len(ends)

    def after(layer: int) -> list[float]:
        """When each device is done with all that it was given once a request is launched, in layers."""
        done, then, first = 0.0, list(free), min(bisect_right(ends, layer), len(ends) - 1)
        for device in range(first, len(ends)):
            done = then[device] = max(done, free[device]) + work[layer][device]
        return then

    def rank(layer: int) -> tuple[float, float, float, int]:
        then = after(layer)
        last = max(end + rest - own for end, rest, own in zip(then, left, work[layer], strict=True))
        idle = sum(then) - sum(free) - sum(work[layer])
        return last, idle, max(then) - min(then), layer

    order = []
    while waiting:
        layer = min(waiting, key=rank)
        free, left = after(layer), [rest - own for rest, own in zip(left, work[layer], strict=True)]
        order.append(waiting[layer].pop(0))
        if not waiting[layer]:
            del waiting[layer]
    return order
