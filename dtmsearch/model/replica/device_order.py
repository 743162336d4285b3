"""Which layers of a model lie on which of several devices, and in which order requests keep these busy. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def equal_work(num_layers: int, num_devices: int, head: float, head_first: bool = False) -> list[int]:
    """For each device the layer above its last, so that each has as much to do in a probe: layer i runs for i + 1 of
    `num_layers` candidates, a head that takes as long as `head` layers for all of them, on the last device or, with
    `head_first`, on the first. Every device has a layer, if there are enough."""
    done = [i * (i + 1) / 2 + head_first * head * num_layers for i in range(num_layers + 1)]
    whole = num_layers * (num_layers + 1) / 2 + head * num_layers
    ends: list[int] = []
    for at in range(1, num_devices):
        wanted = whole * at / num_devices
        closest = min(range(num_layers + 1), key=lambda i: abs(done[i] - wanted))
        least = ends[-1] + 1 if ends else 1
        ends.append(min(max(closest, least), max(least, num_layers - num_devices + at)))
    return [min(end, num_layers) for end in (*ends, num_layers)]


def busy_order(first_layers: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The positions of requests in the order in which they are best launched: layers run from `first_layers[i]` upward
    for request i, and device d holds those below `ends[d]` and from `ends[d - 1]` on.

    A device does what it is given in the order in which it is given, and a request is given to all of its devices when
    it is launched. So one that begins high, which the lower devices never see, has to be launched while another is
    still on its way through these. Always next is what leaves the least work for the device that is done last, then
    what lets devices wait least, then what keeps them closest to each other. (A flow shop of fixed order; for two
    devices Johnson's rule, 1954, is optimal, but lets the queue of the second grow without bounds.) The head, which
    runs for each, is left out: an order by it is as good where any number may be under way, and worse where few are.
    """
    waiting: dict[int, list[int]] = {}  # by first layer
    for position, layer in enumerate(first_layers):
        waiting.setdefault(layer, []).append(position)
    starts = [0, *ends[:-1]]
    work = {
        layer: [max(0, end - max(layer, start)) for start, end in zip(starts, ends, strict=True)] for layer in waiting
    }
    left = [sum(work[layer][device] for layer in first_layers) for device in range(len(ends))]
    free = [0] * len(ends)

    def after(layer: int) -> list[int]:
        """When each device is done with all that it was given once a request is launched, in layers."""
        done, then, first = 0, list(free), min(bisect_right(ends, layer), len(ends) - 1)
        for device in range(first, len(ends)):
            done = then[device] = max(done, free[device]) + work[layer][device]
        return then

    def rank(layer: int) -> tuple[int, int, int, int]:
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
