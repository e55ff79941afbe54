"""What goes to the server when something is wrong at a site."""

import pytest

from client_app.own_images import (
    SiteError,
    min_class_samples,
    names_kept_here,
    open_own_site,
)
from clip2fl_common.config import RunConfig
from clip2fl_common.datasets import DatasetError
from clip2fl_common.teacher import OtherTeacherError, TeacherError
from tests.defaults import run_config

SITE = run_config(dataset__name="sites", dataset__class_names="cat, dog")


@pytest.mark.parametrize(
    ("error", "sent"),
    [
        (
            DatasetError("/secret/x.png is bad", "1 of 9 images cannot be read"),
            "1 of 9",
        ),
        (TeacherError("nothing in /secret"), "its teacher cannot be loaded"),
        (OSError("/secret is full"), "it stopped with OSError"),
        (RuntimeError("/secret"), "it stopped with RuntimeError"),
    ],
)
def test_no_name_from_the_disk_is_sent(error: Exception, sent: str) -> None:
    """The whole error is the cause, for the site's own log."""
    with pytest.raises(SiteError) as caught, names_kept_here(SITE):
        raise error
    assert sent in str(caught.value) and "secret" not in str(caught.value)
    assert caught.value.__cause__ is error
    with pytest.raises(type(error), match="secret"), names_kept_here(run_config()):
        raise error  # a simulation has nothing to keep


def test_another_teacher_is_told_as_it_is() -> None:
    with pytest.raises(OtherTeacherError), names_kept_here(SITE):
        raise OtherTeacherError("a here, but b at the server")


@pytest.mark.parametrize("node", [{}, {"data-path": "images"}, {"data-path": 3}])
def test_node_without_a_folder_says_how_to_start_it(node: dict[str, str | int]) -> None:
    config: RunConfig = SITE
    with pytest.raises(DatasetError, match="--node-config 'data-path="):
        open_own_site(config, node)


@pytest.mark.parametrize(
    ("node", "run", "needed"), [(None, 1, 1), (None, 5, 5), (3, 5, 5), (7, 5, 7)]
)
def test_site_may_ask_for_larger_classes_than_the_run(
    node: int | None, run: int, needed: int
) -> None:
    config = run_config(privacy__min_class_samples=run)
    node_config = {} if node is None else {"min-class-samples": node}
    assert min_class_samples(config, node_config) == needed


@pytest.mark.parametrize("wrong", [0, -1, "5", 2.5])
def test_sites_own_least_number_must_be_one(wrong: int | str | float) -> None:
    with pytest.raises(
        SiteError, match="min-class-samples in the node's --node-config"
    ):
        min_class_samples(run_config(), {"min-class-samples": wrong})
