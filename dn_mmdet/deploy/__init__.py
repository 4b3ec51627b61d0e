"""From a trained model to one that is used: folded into BatchNorm, or as ONNX."""
