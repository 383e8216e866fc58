import pytest

pytestmark = pytest.mark.slow


def test_the_tag_names_the_five(tasks_folder):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks_folder, include_defaults=False)
    assert manager.task_index["sparq_paper"].tags == {
        "sparq_squad",
        "sparq_triviaqa",
        "sparq_cnn_dailymail",
        "sparq_wikitext103",
        "sparq_repetition",
    }
