"""What goes to the server when something is wrong at a site."""

import pytest

from client_app.own_images import SiteError, names_kept_here, open_own_site
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
