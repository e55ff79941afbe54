"""Texts in a kit: a guide for the site, and a policy with every rule as a comment."""

from clip2fl_cli.sites.kit_archive import archive_name

NO_KEY = "0" * 64
POLICY_TEMPLATE = f"""\
# This site's own rules, which no run can change (docs/site-policy.md). A line without
# the mark # in front of it is in force.

# Least number of different images of a class in what leaves the site about the class:
#min-class-samples = 5
# Most images of a class in its gradient, and number of sets of images, if fixed:
#gradient-samples = 32
#gradient-cuts = 1
# Least number of different validation images of a class for its accuracy to leave:
#min-evaluation-samples = 5
# Share of the images that evaluates, whatever a run says:
#validation-share = 0.2
# Least noise on class gradients and class moments, and greatest norm:
#min-noise-multiplier = 1.0
#max-clip-norm = 1.0
# Least noise on the model itself:
#min-model-noise-multiplier = 1.0
# Greatest epsilon, at this delta, of all answers to train together:
#max-epsilon = 8.0
#epsilon-delta = 1e-5
# Whether the server may ask for a confusion matrix, whose row sums are class counts:
#send-confusion-matrix = false
# Only runs with secure aggregation, in sums of at least so many sites; the key with
# which this site signs, and its own list of the sites (docs/secure-aggregation.md):
#secure-only = true
#min-secure-sites = 3
#identity-key = "/absolute/path/of/key"
#trusted-sites = "/absolute/path/of/sites.json"
# Folder for models that the server delivers, the server's public key (what clip2fl
# signing-key prints), the largest model in MiB, how many models are kept, and whether a
# card, which all sites get, may have this site's name and figures
# (docs/model-delivery.md):
#models-folder = "/absolute/path/of/models"
#model-key = "{NO_KEY}"
#max-model-mib = 1024
#max-models = 8
#listed-in-card = false
# Fingerprints of the teachers that may be loaded, and folders with them:
#teachers = []
#teacher-folders = []
# Whether a run may name any model on the Hugging Face hub:
#hub-downloads = false
# Most runs in all, and most requests of each kind in a run:
#max-runs = 10
#max-rounds = 100
# Largest messages in MiB:
#max-request-mib = 512
#max-reply-mib = 512
"""


def guide(site: str, address: str, *, has_key: bool, needs_teacher: bool) -> str:
    """Return a kit's guide.

    Parameters
    ----------
    site : str
        Name of the site.
    address : str
        ``HOST:PORT`` of the server.
    has_key : bool
        Whether the kit has the site's key.
    needs_teacher : bool
        Whether the site must have the teacher's weights already.
    """
    kit = archive_name(site)
    teacher = " --teacher /folder/of/the/teacher" if needs_teacher else ""
    join = f"clip2fl site join {kit} --data /data/{site}{teacher}"
    key = (
        "This archive has the site's private key. Send it on a way that nobody else "
        "reads\n(an encrypted medium, scp), and remove it after you have joined."
        if has_key
        else "This archive is no secret. The first `join` makes the site's key and "
        "prints its public\nhalf. Have that line run at the server, then give the same "
        "command again."
    )
    private = f" {kit}" if has_key else ""
    mounted = (
        "\n        -v /folder/of/the/teacher:/folder/of/the/teacher:ro \\"
        if needs_teacher
        else ""
    )
    weights = (
        "\nThe run's teacher is not in this kit. Put its weights into a folder of this "
        "machine, and\nname the folder with `--teacher`.\n"
        if needs_teacher
        else ""
    )
    return f"""\
# {site}: join the federation at {address}

{key}
{weights}
Compare the fingerprint that `join` prints with the server's by telephone.

With Python: install clip2fl, then give one of

    {join}
    sudo {join} --start systemd

In a checkout, `clip2fl` is `.venv/bin/clip2fl`, and after `make install
LOCK=requirements-node.lock` it is `.venv/bin/python -m clip2fl_cli.app`.

With containers only, where `clip2fl` is the image that deploy/Dockerfile builds:

    mkdir -p /etc/clip2fl/sites && chown 10001 /etc/clip2fl/sites{private}
    docker run --rm -v $PWD:/kit:ro -v /etc/clip2fl/sites:/etc/clip2fl/sites \\{mounted}
        -v /data/{site}:/data/{site}:ro clip2fl \\
        python -m clip2fl_cli.app site join /kit/{kit} --data /data/{site} \\
        --folder /etc/clip2fl/sites/{site} --start container{teacher}

`join` checks this kit and the images, says what to mend, and starts the node or prints
the command that does. Rules of your own: edit policy.toml in the site's folder.
"""
