"""Training of draft models: data, network, losses, loop and offline evaluation in plain PyTorch."""
