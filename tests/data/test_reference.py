import pytest

from rlctl.data.reference import normalized_score, reference_name, reference_scores


@pytest.mark.parametrize(
    ("name", "ret", "score"),
    [
        ("halfcheetah", 5000, 42.530027),
        ("hopper", 1000, 31.348890),
        ("walker2d", 3000, 65.314439),
        ("pen", 1500, 47.096262),
        ("antmaze-large-play-v2", 0.25, 25.0),
        ("D4RL/kitchen/mixed-v2", 3, 75.0),
    ],
)
def test_scores(name: str, ret: float, score: float) -> None:
    assert normalized_score(name, ret) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("Hopper-v5", "hopper"),
        ("Hopper", "hopper"),
        ("mujoco/hopper/medium-v0", "hopper"),
        ("hopper_medium-v2", "hopper"),
        ("ladder/hopper-medium-v0", "hopper"),
        ("HalfCheetah-v4", "halfcheetah"),
        ("Ant-v5", "ant"),
        ("AntMaze_UMaze-v4", "antmaze"),
        ("D4RL/antmaze/umaze-v1", "antmaze"),
        ("AdroitHandPen-v1", "pen"),
        ("D4RL/door/human-v2", "door"),
        ("FrankaKitchen-v1", "kitchen"),
        ("maze2d-umaze-v1", "maze2d-umaze"),
        ("maze2d-large-dense-v1", "maze2d-large-dense"),
        ("maze2d-umaze-sparse-v1", "maze2d-umaze"),
        ("maze2d-eval-umaze-v1", None),
        ("AdroitHandPenSparse-v1", None),
        ("dm_control/hopper-hop-v0", None),
        ("Humanoid-v5", None),
        ("D4RL/pointmaze/umaze-v2", None),
        ("probe:constant", None),
        ("", None),
    ],
)
def test_names(name: str, task: str | None) -> None:
    assert reference_name(name) == task
    assert (normalized_score(name, 1.0) is None) == (task is None)


def test_every_task_scores_0_and_100_at_its_references() -> None:
    assert len(reference_scores()) == 18
    for task, (low, high) in reference_scores().items():
        assert normalized_score(task, low) == 0.0
        assert normalized_score(task, high) == pytest.approx(100.0)
