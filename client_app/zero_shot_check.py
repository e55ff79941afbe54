"""The teacher's zero-shot accuracy on a site's own validation images, before a run.

Only the site sees it. It tells whether the teacher knows these classes and images at
all: distillation from a teacher that guesses does harm.
"""

from pathlib import Path
from statistics import fmean

import numpy as np

from client_app.preflight import Finding
from client_app.site_evaluation import recalls
from clip2fl_common.config import RunConfig
from clip2fl_common.data.datasets import DatasetError, open_site
from clip2fl_common.devices import resolve_device
from clip2fl_common.teacher import TeacherError, load_teacher

# With fewer images, an accuracy says too little for a warning.
ENOUGH_IMAGES = 20


def check_zero_shot(config: RunConfig, folder: Path) -> Finding:
    """Return the teacher's accuracy on a site's validation images.

    Parameters
    ----------
    config : RunConfig
        The run's configuration, with the site's own share of validation images.
    folder : Path
        The site's images, ``<class>/<image>``.

    Returns
    -------
    Finding
        A warning if the accuracy is not better than guessing. What prevents the
        evaluation is a problem of another check, so here it is none.
    """
    try:
        dataset = open_site(config.dataset, folder)
        source = dataset.test
        indices = np.arange(len(source.labels))
        loaded = source.open(indices) if len(indices) else source.load(indices)
        if not len(loaded.labels):
            return Finding("ok", "zero-shot", "no validation image, so no accuracy")
        teacher = load_teacher(
            config.teacher.model,
            config.teacher.pretrained,
            resolve_device(config.device),
            prompt=config.teacher.prompt,
            batch_size=config.teacher.batch_size,
        )
    except (DatasetError, TeacherError, ValueError, OSError) as error:
        return Finding("ok", "zero-shot", f"not computed: {error}")
    prototypes = teacher.text_features(dataset.class_names)
    votes = (teacher.cached_image_features(loaded.images) @ prototypes.T).argmax(1)
    (found,) = recalls({"teacher": votes.cpu()}, loaded.labels).values()
    balanced, chance = fmean(found.values()), 100 / len(dataset.class_names)
    worst = min(found, key=lambda c: found[c])
    images = len(loaded.labels)
    text = (
        f"the teacher's balanced accuracy on {images} validation images of "
        f"{len(found)} classes is {balanced:.1f} % without training (guessing: "
        f"{chance:.1f} %); worst class {dataset.class_names[worst]}: "
        f"{found[worst]:.1f} %"
    )
    if images >= ENOUGH_IMAGES and balanced <= chance:
        return Finding(
            "warning",
            "zero-shot",
            text,
            "check the class names and teacher.prompt, or choose a teacher that knows "
            "such images (docs/teachers.md)",
        )
    return Finding("ok", "zero-shot", text)
