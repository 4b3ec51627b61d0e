"""Whether the detectors of MMDetection's model zoo work with DN-B."""
