"""The benchmark of repairs on a model of two small layers."""

from benchmarks.repair import make_models, measure, shapes
from tests.tiny_models import byte_tokenizer


def test_it_measures_every_tensor(tmp_path):
    make_models(tmp_path, byte_tokenizer(), hidden=64, middle=96, vocabulary=260, layers=2)
    found = measure(tmp_path)
    matrices = {name for name, shape in shapes(64, 96, 260, 2).items() if len(shape) == 2}
    assert found["kept"].keys() == matrices and found["limit_bytes"] == 12 * 260 * 64 + 10**9
    # the planted rank, and noise that the threshold removes
    assert all(kept == 8 and total == 64 and 0.9 < norm < 1 for kept, total, norm in found["kept"].values())
    assert 0 < found["cpu_seconds"] <= found["extrapolated_cpu_seconds_of_32_layers"]
    assert found["peak_bytes"] is None or 0 <= found["peak_bytes"] < found["limit_bytes"]
