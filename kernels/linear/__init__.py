"""Matrix products with a model's weights: `y = W x`, with the neighbours that cost a pass over memory fused in.

Shapes: R rows, K inputs, N outputs.
Law: each output of a row is one sum over K in a fixed order, whatever R is.
"""
# interface: LinearWeight (opaque, packed for one backend; .num_rows N, .num_columns K, .num_bytes, .backend, .dequantised() -> [N, K] float32)
# pack(matrices: Sequence[EncodedMatrix], *, device, bias: Tensor | None = None) -> LinearWeight     several matrices = stacked outputs (q, k, v)
# pack_gated(gate: EncodedMatrix, up: EncodedMatrix, *, device) -> LinearWeight
# linear(x [R, K] f32, weight, *, norm: Norm | None = None, residual: Tensor | None = None, select: Tensor | None = None) -> Tensor [R or len(select), N] f32
#     norm: RMS norm of the row first; residual: added to the result; select: int32 [L], take only these rows of x (lm_head)
# gated_linear(x [R, K], weight, *, norm) -> [R, N/2]     silu(gate) * up
