"""Names of slices, as people and Google write them."""

import pytest

from lpc_jax.planning import chips

# Google Cloud documentation, "TPU v5e", "TPU v5p" and "TPU v6e": accelerator types.
NAMES = [
    ("v5e:8x8", "v5e:8x8", 64),
    ("v5e-64", "v5e:8x8", 64),
    ("v5litepod-16", "v5e:4x4", 16),
    ("v5e-1", "v5e:1x1", 1),
    ("v5p:2x2x1", "v5p:2x2x1", 4),
    ("v5p-8", "v5p:2x2x1", 4),
    ("v5p-16", "v5p:2x2x2", 8),
    ("v5p-128", "v5p:4x4x4", 64),
    ("v6e-8", "v6e:2x4", 8),
    ("tpu:v6e:2x4", "v6e:2x4", 8),
    ("gpu:1xh100", "gpu:1xh100", 1),
    ("gpu:16xa100", "gpu:16xa100", 16),
]


@pytest.mark.parametrize(("text", "topology", "count"), NAMES)
def test_a_topology_by_layout_or_by_name(text, topology, count):
    found = chips.named(topology=text, devices=None)
    assert (found.topology, found.count, found.name) == (topology, count, topology)


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [("gpu:8xh100", "h100", 8), ("1xa100", "a100", 1), ("tpu:4xv5p", "v5p", 4)],
)
def test_devices_by_kind_and_number(text, kind, count):
    found = chips.named(topology=None, devices=text)
    assert (found.chip.name, found.count, found.topology) == (kind, count, None)
    assert found.name == f"{count} x {kind}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "v5q:2x2",
            "--topology must be a TPU slice or GPUs: v5e:8x8, v5p-8, v6e-8, gpu:8xh100,"
            " got 'v5q:2x2'. Use such a one.",
        ),
        (
            "h100-8",
            "--topology must be a TPU slice or GPUs: v5e:8x8, v5p-8, v6e-8, gpu:8xh100,"
            " got 'h100-8'. Use such a one.",
        ),
        (
            "v5p-7",
            "--topology must be one of v5p:2x2x1 (v5p-8), v5p:2x2x2 (v5p-16), v5p:2x2x4"
            " (v5p-32), v5p:2x4x4 (v5p-64), v5p:4x4x4 (v5p-128), v5p:4x4x8 (v5p-256),"
            " v5p:4x8x8 (v5p-512), v5p:8x8x8 (v5p-1024), got 'v5p-7'. Use such a one.",
        ),
        (
            "v6e:3x3",
            "--topology must be one of v6e:1x1 (v6e-1), v6e:2x2 (v6e-4), v6e:2x4"
            " (v6e-8), v6e:4x4 (v6e-16), v6e:4x8 (v6e-32), v6e:8x8 (v6e-64), v6e:8x16"
            " (v6e-128), v6e:16x16 (v6e-256), got 'v6e:3x3'. Use such a one.",
        ),
        (
            "v5e",
            "--topology must be one of v5e:1x1 (v5e-1), v5e:2x2 (v5e-4), v5e:2x4"
            " (v5e-8), v5e:4x4 (v5e-16), v5e:4x8 (v5e-32), v5e:8x8 (v5e-64), v5e:8x16"
            " (v5e-128), v5e:16x16 (v5e-256), got 'v5e'. Use such a one.",
        ),
        (
            "gpu:8xl4",
            "--topology must be of GPUs that programs can be compiled for (a100, h100,"
            " h200), got 'gpu:8xl4'. Use --devices gpu:8xl4 for arithmetic.",
        ),
        (
            "gpu:12xh100",
            "--topology must be of whole machines above 8 GPUs, got 'gpu:12xh100'. Use"
            " a multiple of 8.",
        ),
        (
            "gpu:h100",
            "--topology must be a number of chips such as tpu:8xv5e, tpu:8xv5p,"
            " tpu:8xv6e, gpu:8xa100, gpu:8xh100, gpu:8xh200, gpu:8xl4, gpu:8xrtx4090,"
            " got 'gpu:h100'. Use one of these kinds.",
        ),
    ],
)
def test_a_slice_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        chips.named(topology=text, devices=None)
    assert str(error.value) == message


@pytest.mark.parametrize("text", ["8h100", "gpu:0xh100", "gpu:8xv5e", "8xb200", ""])
def test_devices_that_are_none_are_refused(text):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        chips.named(topology=None, devices=text)
    assert str(error.value) == (
        "--devices must be a number of chips such as tpu:8xv5e, tpu:8xv5p, tpu:8xv6e,"
        f" gpu:8xa100, gpu:8xh100, gpu:8xh200, gpu:8xl4, gpu:8xrtx4090,"
        f" got {text!r}. Use one of these kinds."
    )


@pytest.mark.parametrize("both", [None, "v5e:8x8"])
def test_exactly_one_of_the_two_flags(both):
    with pytest.raises(ValueError, match="exactly one of --topology and --devices"):
        chips.named(topology=both, devices=both)


def test_every_layout_has_a_name_of_its_own():
    for chip in chips.CHIPS.values():
        for layout in chip.layouts:
            by_layout = chips.parse_topology(f"{chip.name}:{layout}")
            cores = by_layout.count * chip.cores_in_name
            assert chips.parse_topology(f"{chip.name}-{cores}") == by_layout
