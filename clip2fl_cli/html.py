"""HTML pages from templates. Text from a foreign run passes two guards.

`shown` disables characters that reverse text, and Jinja escapes markup.
"""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clip2fl_cli import colours
from clip2fl_common.shown import shown


def render(template: str, **values: object) -> str:
    """Return a page.

    Parameters
    ----------
    template : str
        Name of a file in ``clip2fl_cli/templates``. It may use ``light`` and ``dark``,
        the CSS declarations of the colours.
    **values : object
        The other values that it uses.

    Returns
    -------
    str
    """
    environment = Environment(
        loader=PackageLoader("clip2fl_cli"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
    )
    return environment.get_template(template).render(
        light=Markup(colours.css(dark=False)),
        dark=Markup(colours.css(dark=True)),
        **values,
    )


def _printable(value: object) -> object:
    if isinstance(value, str) and not isinstance(value, Markup):
        return shown(value)
    return value
