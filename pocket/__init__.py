"""The pocket Llama: how this project makes the small model that it ships. `make pocket-model`."""
