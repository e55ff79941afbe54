"""CLIP2FL: CReFF guided by a vision-language model (Shi et al., AAAI 2024)."""

from collections.abc import Iterable
from logging import INFO, WARNING
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from clip2fl_common import messages
from clip2fl_common.config import Distillation
from strategy.base import ClientPlan, Setting
from strategy.clients import SitePlan
from strategy.creff import CReFF


class CLIP2FL(CReFF):
    """CReFF with distillation at the clients and text prototypes at the server.

    Clients distil from the teacher's image encoder (Eq. 5). The server holds the
    federated features near the teacher's text features by a prototype contrastive
    loss (Eq. 9-10).

    Parameters
    ----------
    plan : ClientPlan or SitePlan
        Who trains when and where.
    text_features : Tensor, shape [C, d]
        Unit text features of the teacher.
    teacher_fingerprint : str
        The teacher that clients must have.
    distillation : Distillation
        Settings of the distillation.
    **creff_settings : Any
        Settings of `CReFF`.

    Raises
    ------
    ValueError
        If the teacher's embedding is not as wide as the student's features.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(
        self,
        plan: ClientPlan | SitePlan,
        *,
        text_features: torch.Tensor,
        teacher_fingerprint: str,
        distillation: Distillation,
        **creff_settings: Any,
    ) -> None:
        super().__init__(plan, **creff_settings)
        if text_features.shape[1] != self.shape[2]:
            raise ValueError(
                f"model.feature-dim = {self.shape[2]}, but the teacher's embedding has "
                f"{text_features.shape[1]} dimensions; set model.feature-dim to that"
            )
        self._text_features = text_features.to(self.device)
        self.teacher_fingerprint = teacher_fingerprint
        self.distillation = distillation
        if distillation.weight == 0:
            log(
                WARNING,
                "distillation.weight = 0: clients do not distil from the teacher; only "
                "the text prototypes at the server are left of CLIP2FL",
            )
        if self.synthesis.contrast_weight == 0:
            log(
                WARNING,
                "synthesis.contrast-weight = 0: the text prototypes are not used; only "
                "the distillation at the clients is left of CLIP2FL",
            )

    @staticmethod
    def settings(setting: Setting) -> dict[str, Any]:
        """Return the keyword arguments that a run's configuration decides."""
        assert setting.teacher is not None
        return {
            "text_features": setting.teacher.text_features(setting.class_names),
            "teacher_fingerprint": setting.teacher.fingerprint,
            "distillation": setting.config.distillation,
            **CReFF.settings(setting),
        }

    @property
    def text_features(self) -> torch.Tensor | None:
        """Class prototypes near which features are held, shape [C, d]."""
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
        """Have sites evaluate the teacher too, for comparison."""
        config[messages.TEACHER_FINGERPRINT] = self.teacher_fingerprint
        return super().configure_evaluate(server_round, arrays, config, grid)
