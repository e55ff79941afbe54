"""Test what reaches the server when an error occurs at a site."""

import pytest

from client_app.images import OtherCodeError, SiteError, names_kept_here
from client_app.own_site import OwnSite
from client_app.site_policy import LONGEST_REASON
from clip2fl_common.config import ConfigError
from clip2fl_common.data.datasets import DatasetError
from clip2fl_common.teacher import OtherTeacherError, TeacherError

SITE = {"data-path": "/secret"}
SIMULATED = {"partition-id": 0}


@pytest.mark.parametrize("node", [SITE, {}, {"datapath": "/secret"}])
@pytest.mark.parametrize(
    ("error", "sent"),
    [
        (TeacherError("nothing in /secret"), "its teacher cannot be loaded"),
        (OSError("/secret is full"), "it stopped with OSError"),
        (RuntimeError("/secret"), "it stopped with RuntimeError"),
        (OtherCodeError("the code in /secret"), "the client code here is not"),
    ],
)
def test_no_name_from_the_disk_is_sent(
    node: dict[str, str], error: Exception, sent: str
) -> None:
    """The cause holds the full error, for the site's own log."""
    with pytest.raises(SiteError) as caught, names_kept_here(node):
        raise error
    assert sent in str(caught.value) and "secret" not in str(caught.value)
    assert caught.value.__cause__ is error
    with pytest.raises(type(error), match="secret"), names_kept_here(SIMULATED):
        raise error  # a simulation keeps nothing back


def test_unusable_images_are_told_without_their_names() -> None:
    """The app sends the summary and logs the rest."""
    error = DatasetError("/secret/x.png is bad", "1 of 9 images cannot be read")
    with pytest.raises(DatasetError, match="/secret/x.png") as caught:
        with names_kept_here(SITE):
            raise error
    assert caught.value.summary == (
        "1 of 9 images cannot be read; the site's own log says more"
    )


@pytest.mark.parametrize("kind", [OtherTeacherError, ConfigError])
def test_what_speaks_of_the_run_is_told_in_one_bounded_line(
    kind: type[Exception],
) -> None:
    with pytest.raises(SiteError) as caught, names_kept_here(SITE):
        raise kind("a here,\n but \x1b[31mb at the\u2028server " + "long " * 1000)
    told = str(caught.value)
    assert told.startswith("a here, but [31mb at the server long long")
    assert told.isprintable() and len(told) == LONGEST_REASON


@pytest.mark.parametrize("node", [{}, {"data-path": "images"}, {"data-path": 3}])
def test_node_without_a_folder_says_how_to_start_it(node: dict[str, str | int]) -> None:
    with pytest.raises(DatasetError, match="--node-config 'data-path="):
        OwnSite.of(node)
