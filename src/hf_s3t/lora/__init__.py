"""What a stage owns in a model: everything that touches PEFT."""
