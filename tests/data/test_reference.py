import pytest

from rlctl.data.reference import normalized_score, reference_name, reference_scores, run_score, score_text


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


def test_the_control_suite_scores_a_tenth_of_the_return_in_every_run() -> None:
    assert reference_name("dmc:hopper-stand") is None, "D4RL's hopper is another task"
    for on_data in (False, True):
        assert run_score("dmc:hopper-stand", 432.0, on_data=on_data) == pytest.approx(43.2)
    assert score_text("dmc:hopper-stand", 43.2) == "score 43.2 = return / 10"
    assert run_score("Hopper-v5", 1000.0, on_data=False) is None
    assert run_score("Hopper-v5", 1000.0, on_data=True) == pytest.approx(31.348890)
    assert score_text("Hopper-v5", 31.34) == "D4RL-normalised 31.3"
    assert run_score("Pendulum-v1", 1.0, on_data=True) is None
