"""BAGEL on two ranks of ZeRO-3 against the whole model."""

from tests.train.conftest import run_ranks


def test_partitioned_weights_load_draw_and_learn_like_whole_ones(tmp_path, random_bagel_folder):
    for results in run_ranks(2, "bagel_ranks.py", tmp_path / "out", str(random_bagel_folder)):
        for differences in results.values():
            assert differences["weights"] == 0
            assert differences["outputs"] < 1e-5
            assert abs(differences["grad_norm"]) < 1e-5
            assert differences["step"] < 1e-5
