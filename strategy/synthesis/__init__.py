"""Federated features: synthetic features whose class gradients match the clients'."""

from strategy.gradient_mean import mean_class_gradients as mean_class_gradients
from strategy.synthesis.descent import synthesis_gradient as synthesis_gradient
from strategy.synthesis.descent import synthesize as synthesize
from strategy.synthesis.losses import Objective as Objective
from strategy.synthesis.losses import class_chunks as class_chunks
from strategy.synthesis.losses import gradient_matching_loss as gradient_matching_loss
from strategy.synthesis.losses import (
    prototype_contrastive_loss as prototype_contrastive_loss,
)
