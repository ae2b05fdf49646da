"""One dictionary, or several of a layer, on text they were not trained on."""
