"""The big passes of Dynamic Normalization, in three backends with the same signatures.

`torch_ops` is made of stock operators, `cpp_ops` compiled for CPUs, `triton_ops` for GPUs.
Everything between the passes is (N, C) small: ``Coefficients``, in each backend too, or
plain PyTorch under autograd. For x (N, C, ...) of at least
three dimensions, not empty, with S values in each of a sample's channels, ``m, v`` (N, C)
the mean and population variance of those, and coefficients (N, C) in float32 at least:

==========================================  ==============================================
``moments(x) -> m, v``                      reads x
``affine(x, m, a, c) -> y``                 ``y = a (x - m) + c``; reads x, writes y
``reduce(dy, x, m) -> da, dc``              ``da = sum dy (x - m)``, ``dc = sum dy``;
                                            reads dy and x
``input_gradient(dy, x, m, a, p, q) -> dx`` ``dx = a dy + p (x - m) + q``; reads dy and x,
                                            writes dx
==========================================  ==============================================

Outputs as big as x have its dtype and, where that is contiguous or channels_last, its
memory format; any other x is copied first. ``dy`` may have any strides. Centring on m
keeps channels with ``|mean| >> std`` accurate. None of these is differentiable. A backend
may also have ``infer``, all of a layer at one call where no gradient is needed. `operators`
has a whole layer as an operator of torch.library, for `torch.compile`.
"""
