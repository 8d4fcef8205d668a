"""Context Forcing: long-context video generation, distilled from a long-context teacher (arXiv 2602.06028).

docs/method.md links each equation of the paper to the function that computes it.

Shapes, everywhere in this package:
    B  batch            F  latent frames (the first is 1 video frame, every other 4)    C  latent channels
    H  latent height    W  latent width                                                 S  tokens of one frame = H/2 * W/2
    N  attention heads  D  channels of one head                                         T  text tokens, E text channels
    V  video frames     Y  video height, X video width (pixels, uint8 RGB, last axis 3)
"""
