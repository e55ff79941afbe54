"""CLIP2FL: CReFF guided by a vision-language model (Shi et al., AAAI 2024)."""

from collections.abc import Iterable, Sequence
from logging import INFO, WARNING
from typing import ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from clip2fl_common import messages
from clip2fl_common.shown import listed
from strategy.creff import CReFF
from strategy.log import log
from strategy.setting import Setting

# Text features with a greater cosine are the same but for the last digits.
SAME_COSINE = 1 - 1e-6
# Classes to compare with all others at a time.
ROWS = 1024
# Groups of such classes that a message names.
SHOWN_GROUPS = 5


class CLIP2FL(CReFF):
    """CReFF with distillation at the clients and text prototypes at the server.

    Clients distil from the teacher's image encoder (Eq. 5). The server pulls the
    federated features towards the teacher's text features by a prototype contrastive
    loss (Eq. 9-10).

    Attributes
    ----------
    teacher_fingerprint : str
        Fingerprint of the teacher that clients must have.
    distillation : Distillation
        Settings of the distillation.

    Raises
    ------
    ValueError
        If the teacher's embedding and the student's features differ in width.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        assert setting.teacher is not None
        text_features = setting.teacher.text_features(setting.class_names)
        if text_features.shape[1] != self.shape[2]:
            raise ValueError(
                f"model.feature-dim = {self.shape[2]}, but the teacher's embedding has "
                f"{text_features.shape[1]} dimensions; set model.feature-dim to that"
            )
        _warn_of_equal(text_features, setting.class_names, setting.teacher.name)
        self._text_features = text_features.to(self.device)
        self.teacher_fingerprint = setting.teacher.fingerprint
        self.distillation = setting.config.distillation
        if self.distillation.weight == 0:
            views = "" if self.distillation.views == 0 else ", nor train on its views"
            log(
                WARNING,
                "distillation.weight = 0: clients do not distil from the teacher%s; "
                "only the text prototypes at the server are left of CLIP2FL",
                views,
            )
        if self.synthesis.contrast_weight == 0:
            log(
                WARNING,
                "synthesis.contrast-weight = 0: the text prototypes are not used; only "
                "the distillation at the clients is left of CLIP2FL",
            )

    @property
    def text_features(self) -> torch.Tensor | None:
        """Return the text features that serve as class prototypes, shape [C, d]."""
        return self._text_features

    def summary(self) -> None:
        """Log the settings of both CLIP terms."""
        log(INFO, "\t├──> CLIP guidance:")
        log(
            INFO,
            "\t│\t├── Distillation: weight %g, temperature %g",
            self.distillation.weight,
            self.distillation.temperature,
        )
        if self.distillation.views > 0 and self.distillation.weight > 0:
            log(
                INFO,
                "\t│\t├── Views of each image: %d (%s, mixing: %s)",
                self.distillation.views,
                self.distillation.view_kind,
                self.distillation.view_mix,
            )
        log(
            INFO,
            "\t│\t├── Prototype contrast: weight %g, temperature %g",
            self.synthesis.contrast_weight,
            self.synthesis.contrast_temperature,
        )
        log(INFO, "\t│\t└── Teacher fingerprint: %s", self.teacher_fingerprint[:12])
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Switch distillation on at the clients."""
        config[messages.DISTILLATION_WEIGHT] = self.distillation.weight
        config[messages.DISTILLATION_TEMPERATURE] = self.distillation.temperature
        config[messages.TEACHER_FINGERPRINT] = self.teacher_fingerprint
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask sites to evaluate the teacher too, for comparison."""
        config[messages.TEACHER_FINGERPRINT] = self.teacher_fingerprint
        return super().configure_evaluate(server_round, arrays, config, grid)


def _warn_of_equal(
    text_features: torch.Tensor, class_names: Sequence[str], teacher: str
) -> None:
    """Warn of a teacher to which classes are the same.

    The demo's teacher takes all words that it does not know for one. Many tokenizers
    know no capital letters, so that "Cat" is "cat".
    """
    unit = text_features.double()
    first = torch.cat(
        [(rows @ unit.T > SAME_COSINE).byte().argmax(1) for rows in unit.split(ROWS)]
    )
    # Class names by the first class that has the same text feature.
    same: dict[int, list[str]] = {}
    for place, name in zip(first.tolist(), class_names, strict=True):
        same.setdefault(place, []).append(name)
    groups = [names for names in same.values() if len(names) > 1]
    alike = "; ".join(listed(names) for names in groups[:SHOWN_GROUPS])
    alike += "; ..." * (len(groups) > SHOWN_GROUPS)
    if groups:
        log(
            WARNING,
            "the teacher %s does not tell these classes apart, as it has the same text "
            "feature for them: %s.%s Change their names, or set teacher.model to a "
            "teacher that knows them (docs/teachers.md)",
            teacher,
            alike,
            " It teaches nothing of any class." if len(groups) == len(same) else "",
        )
