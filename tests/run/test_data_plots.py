import numpy as np
import pytest

from bpt_rl.datasets.survey import Dataset, Survey
from bpt_rl.run.data_plots import draw_surveys


def survey_of(name, seed, *, num_episodes=30, domain="walker", num_features=4, tasks=("stand", "walk")):
    generator = np.random.default_rng(seed)
    return Survey(
        dataset=Dataset(path=f"/data/{domain}/{name}", domain=domain, source=f"{domain}/{name}"),
        subset="full",
        action_repeat=1,
        num_steps=np.full(num_episodes, 10),
        returns={task: generator.exponential(size=num_episodes).astype(np.float32) for task in tasks},
        feature_names=tuple(f"feature_{i}" for i in range(num_features)),
        states=generator.normal(size=(200, num_features)) * (1 + seed),
    )


def test_each_task_has_a_line_a_dataset_with_the_share_that_earns_so_much():
    surveys = [survey_of("rnd", 0), survey_of("random", 1, num_episodes=7, tasks=("stand",))]
    upper, _ = draw_surveys(surveys).subfigs
    assert [axes.get_title() for axes in upper.axes] == ["stand", "walk"]
    assert [text.get_text() for text in upper.legends[0].get_texts()] == ["rnd", "random"]
    for survey, line in zip(surveys, upper.axes[0].get_lines()[::2], strict=True):
        returns = survey.returns["stand"]
        expected = [(value, np.mean(returns >= value)) for value in sorted(returns.tolist())]
        np.testing.assert_allclose(line.get_xydata(), expected, rtol=1e-6)
        assert line.get_drawstyle() == "steps-pre"
    assert [len(line.get_xdata()) for line in upper.axes[1].get_lines()[::2]] == [30, 0]


@pytest.mark.parametrize(
    ("num_features", "pairs"), [(2, [(0, 1)]), (4, [(0, 1), (2, 3)]), (3, [(0, 1), (1, 2)])]
)
def test_states_of_all_datasets_are_counted_in_the_same_cells(num_features, pairs):
    surveys = [survey_of(name, i, num_features=num_features) for i, name in enumerate(("a", "b", "c"))]
    axes = [panel for panel in draw_surveys(surveys).subfigs[1].axes if panel.get_title()]
    assert len(axes) == 3 * len(pairs)
    for row, (first, second) in enumerate(pairs):
        panels = axes[3 * row : 3 * row + 3]
        assert len({(panel.get_xlim(), panel.get_ylim()) for panel in panels}) == 1
        assert (panels[1].get_xlabel(), panels[0].get_ylabel()) == (f"feature {first}", f"feature {second}")
        for survey, panel in zip(surveys, panels, strict=True):
            [mesh] = panel.collections
            assert mesh.get_array().sum() == pytest.approx(1)
            edges = mesh.get_coordinates()
            counts, *_ = np.histogram2d(
                *survey.states[:, [first, second]].T, [edges[0, :, 0], edges[:, 0, 1]]
            )
            np.testing.assert_allclose(mesh.get_array().filled(0), counts.T / 200)


def test_a_dataset_without_features_has_its_returns_alone():
    [part] = draw_surveys([survey_of("toy", 0, domain="minari/toy", num_features=0)]).subfigs
    assert len(part.axes) == 2
