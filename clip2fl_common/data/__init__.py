"""Images: data sets by name, folders of images, partitions, and what is drawn."""
