"""Transfer learning on chest X-rays: data, backbones, freezing and training, usable without the sweep."""
