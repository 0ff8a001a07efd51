"""Networks: encoders behind one contract, decoders, and the segmenter that joins them."""
