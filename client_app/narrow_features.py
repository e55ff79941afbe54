"""Features of a client's images, from which sums and statistics are computed."""

import torch

from client_app.part import ClientRound
from client_app.training import held_images, mixed_precision
from clip2fl_common.models import folded, narrow_width
from clip2fl_common.parallel import map_pieces


@torch.no_grad()
def narrow_features(client: ClientRound) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of the images that may be used, and their labels.

    Classes with fewer images than ``privacy.min-class-samples`` are left out, and a
    site may fix its images (`ClientRound.fixed_images`). Images are not augmented.

    Parameters
    ----------
    client : ClientRound
        The client and the global model.

    Returns
    -------
    tuple of Tensor
        Features [n, D] in float64, and labels [n]. D is `narrow_width`. In the order of
        the client's images, on the CPU; n may be 0.
    """
    config, device = client.config, client.images.device
    network = folded(client.model)
    held = held_images(
        client.labels, config.privacy.min_class_samples, client.fixed_images()
    )
    places = torch.cat([torch.empty(0, dtype=torch.int64), *held.values()])
    places = places.sort().values.to(device)

    def features_of(batch: torch.Tensor) -> torch.Tensor:
        with mixed_precision(device, client.precision):
            return network.narrow(client.images[batch]).float()

    batches = places.split(config.evaluation.batch_size) if len(places) else ()
    width = narrow_width(config.model.name, config.model.feature_dim)
    found = [torch.empty(0, width), *map_pieces(features_of, batches, device)]
    features = torch.cat([part.cpu() for part in found])
    return features.double(), client.labels[places].cpu()
