import pytest

from graphcomb.graph.errors import BadInput, nearest
from graphcomb.runtime.devices.table import CPU, TARGETS, TENSOR_CORE, get_target

REQUIRED = (
    "orin-nano orin-nx agx-orin agx-thor drive-orin drive-thor rtx-sm75 rtx-sm80 rtx-sm86 rtx-sm89 rtx-sm120 rtx-sm121 "
    "h100 h200 b200 b300 cpu cpu-openvino"
).split()


def test_every_device_is_in_the_table_under_its_name() -> None:
    assert set(TARGETS) >= set(REQUIRED)
    assert all(get_target(name).name == name for name in TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_every_type_of_a_device_has_alignment_and_peak(name: str) -> None:
    target = get_target(name)
    assert {"fp32", "fp16"} <= set(target.dtypes)
    for dtype in target.dtypes:
        assert target.alignment(dtype) in (4, 8, 16, 32)
        assert target.peak(dtype) >= target.peak("fp32") > 1e11
    assert 10 < target.bandwidth < 10_000
    assert 17 <= target.opset <= 25


def test_alignments() -> None:
    orin, cpu = get_target("agx-orin"), get_target("cpu")
    assert [orin.alignment(d) for d in ("fp32", "tf32", "fp16", "bf16", "int8")] == [4, 4, 8, 8, 32]
    assert orin.alignment("fp16", sparse=True) == 16
    assert {cpu.alignment(d) for d in cpu.dtypes} == {8} == set(CPU.values())
    assert get_target("agx-thor").alignment("fp8") == TENSOR_CORE["fp8"] == 16


def test_a_type_the_device_lacks_is_refused() -> None:
    with pytest.raises(BadInput, match=r"orin-nano: no fp8; it computes in fp32, tf32, fp16, bf16, int8"):
        get_target("orin-nano").alignment("fp8")
    with pytest.raises(BadInput, match="rtx-sm75: no int8"):
        get_target("rtx-sm75").peak("int8")


@pytest.mark.parametrize(
    ("name", "capability", "sm"),
    [
        ("agx-orin", (8, 7), "SM87"),
        ("agx-thor", (11, 0), "SM110"),
        ("rtx-sm121", (12, 1), "SM121"),
        ("b200", (10, 0), "SM100"),
        ("b300", (10, 3), "SM103"),
        ("cpu", None, None),
        ("cpu-openvino", None, None),
    ],
)
def test_compute_capability(name: str, capability: tuple[int, int] | None, sm: str | None) -> None:
    assert get_target(name).processor == (capability is None)
    assert get_target(name).compute_capability == capability
    assert get_target(name).sm == sm


def test_the_opset_is_what_the_oldest_release_parses() -> None:
    assert get_target("drive-orin").opset == 17  # TensorRT 8.6
    assert get_target("agx-orin").opset == 20  # 10.3
    assert get_target("h100").opset == 25  # 11.4


def test_dla() -> None:
    assert get_target("agx-thor").dla is None
    assert get_target("orin-nano").dla is None
    dla = get_target("agx-orin").dla
    assert dla is not None
    assert dla.max_dim == 8192
    assert (10, 3) in dla.tensorrt


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("orin", "agx-orin"), ("thor", "agx-thor"), ("rtx-sm-86", "rtx-sm86"), ("H100", "h100"), ("CPU", "cpu")],
)
def test_unknown_targets_name_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(BadInput, match=rf"target {name}: not known; did you mean .*{suggestion}"):
        get_target(name)


def test_far_names_list_all() -> None:
    assert nearest("zzz", ["one", "two"]) == "known: one, two"
