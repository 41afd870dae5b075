"""Traffic between chips and operations, read from what the compiler wrote: programs for eight CPU devices, and lines
of a TPU's."""

import jax
import jax.numpy as jnp
import pytest

from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, train_mesh
from srlm_jax.plan import hlo

RULES = {"rows": ("fsdp",), "columns": ("tensor",), "whole": ()}


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.fixture(scope="module")
def mesh():
    return train_mesh(MeshShape(data=1, fsdp=4, tensor=2))


def array(mesh, shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rules.sharding(mesh, RULES, axes))


def test_what_a_loop_does_counts_as_often_as_it_runs(mesh):
    """Three layers, each a product over a split axis: 64 x 32 numbers of 4 bytes, reduced over two devices."""

    def layers(x, w):
        def layer(x, w):
            y = x @ w
            return jax.lax.with_sharding_constraint(y, rules.sharding(mesh, RULES, ("whole", "columns"))) * 2, None

        return jax.lax.scan(layer, x, w)[0]

    x = array(mesh, (64, 32), "whole", "columns")
    text = compiled(layers, x, array(mesh, (3, 32, 32), "whole", "columns", "whole"))
    found = [one for one in hlo.collectives(text, unknown_trips=(1,)) if one.runs == 3]
    assert found
    assert {one.group for one in found} == {2}
    whole = 64 * 32 * 4
    assert sum(one.total for one in found) in (3 * whole, 3 * whole / 2)  # reduced whole, or in halves


def test_a_gather_brings_what_a_device_lacks(mesh):
    def gather(x):
        return jax.lax.with_sharding_constraint(x, rules.replicated(mesh))

    (found,) = hlo.collectives(compiled(gather, array(mesh, (64, 32), "rows", "whole")), unknown_trips=(1,))
    assert (found.kind, found.group, found.runs) == ("all-gather", 4, 1)
    assert found.received == 64 * 32 * 4 * 3 / 4


def test_nothing_is_found_where_nothing_is_exchanged(mesh):
    assert (
        hlo.collectives(compiled(lambda x: x * 2, array(mesh, (64, 32), "rows", "columns")), unknown_trips=(1,)) == []
    )


# As the TPU's compiler writes it: an exchange spread over two fusions of a loop of 8, whose end is a comparison.
TPU = """HloModule jit_step

%fused.1 (p: bf16[256,64]) -> bf16[4096,64] {
  %g.1 = bf16[4096,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4,'y'=4] {'y'}
}

%fused.2 (p: bf16[256,64]) -> bf16[4096,64] {
  %g.2 = bf16[4096,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4,'y'=4] {'y'}
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %c.9 = s32[]{:T(128)} constant(8)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %c.9), direction=LT
}

%open (p: (s32[], f32[8])) -> pred[] {
  %c.1 = s32[] constant(16)
  %lt.3 = pred[] compare(%i, %c.1), direction=LT
  ROOT %both = pred[] and(%lt.3, %any)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %k = bf16[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"notes":"{}"
}}, metadata={op_name="kernel"}
  %x.1 = bf16[4096,64]{1,0} fusion(%p), kind=kOutput, calls=%fused.1
  %x.2 = bf16[4096,64]{1,0} fusion(%p), kind=kOutput, calls=%fused.2
  %s = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x.3), channel_id=9, source_target_pairs={{0,1}}
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w.2 = (s32[], f32[8]) while(%t), condition=%cond, body=%body
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w.1 = (s32[], f32[8]) while(%t), condition=%open, body=%outer
  %r = (f32[6]{0}, bf16[4]{0}) all-reduce(%a, %b), channel_id=1, replica_groups=[2,8]<=[16], to_apply=%add
  %q = f32[4]{0} reduce-scatter(%a), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}
"""


def test_a_tpu_program():
    found = {one.kind: one for one in hlo.collectives(TPU, unknown_trips=(16,))}
    assert len(found) == 4
    gather, permute = found["all-gather"], found["collective-permute"]
    assert (gather.runs, gather.group, gather.received) == (16 * 8, 4, 4096 * 64 * 2 * 3 / 4)
    assert (permute.runs, permute.received) == (16 * 8, 32)
    assert (found["all-reduce"].group, found["all-reduce"].received) == (8, 2 * (24 + 8) * 7 / 8)
    assert (found["reduce-scatter"].group, found["reduce-scatter"].received) == (4, 16 * 3)


def test_products_count_as_often_as_their_loop_runs(mesh):
    """Three layers of 64 x 32 by 32 x 32 and a sum over 32 of them, with rows on four devices and columns on two."""

    def layers(x, w):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return jnp.einsum("bte,bse->bts", y.reshape(4, 16, 32), x.reshape(4, 16, 32))

    x = array(mesh, (64, 32), "rows", "whole")
    text = compiled(layers, x, array(mesh, (3, 32, 32), "whole", "whole", "columns"))
    all_of_them = 3 * 2 * 64 * 32 * 32 + 2 * 4 * 16 * 16 * 32
    assert hlo.product_flops(text, unknown_trips=(1,)) == all_of_them / 8


# Products of a TPU's program: heads as places of a window over padding (4 of 128 numbers from 512 of 128 rows), a plain
# matrix, and a batch of four, each in a loop of 8 that runs twice.
PRODUCTS = """HloModule jit_step

%fused.1 (p: bf16[128,512,1], q: bf16[4,512,128]) -> bf16[128,4,128] {
  %p = bf16[128,512,1]{1,0,2} parameter(0)
  %q = bf16[4,512,128]{2,1,0} parameter(1)
  ROOT %c.1 = bf16[128,4,128] convolution(%p, %q), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0io->b0f
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %c.9 = s32[]{:T(128)} constant(8)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %c.9), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = bf16[32,512]{1,0} get-tuple-element(%p), index=1
  %b = bf16[512,256]{1,0} get-tuple-element(%p), index=2
  %x.1 = bf16[128,4,128]{2,1,0} fusion(%d, %e), kind=kOutput, calls=%fused.1
  %c.2 = f32[32,256]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  %f = bf16[4,16,64]{2,1,0} get-tuple-element(%p), index=3
  %g = bf16[4,64,32]{2,1,0} get-tuple-element(%p), index=4
  %c.3 = bf16[4,16,32] convolution(%f, %g), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

%open (p: (s32[], f32[8])) -> pred[] {
  ROOT %both = pred[] and(%lt.3, %any)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w.1 = (s32[], f32[8]) while(%t), condition=%open, body=%outer
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w.2 = (s32[], f32[8]) while(%t), condition=%cond, body=%body
}
"""


def test_what_is_multiplied_with_padding_is_no_operation():
    heads, plain, batch = 2 * 128 * 512 * 4 * 128, 2 * 32 * 512 * 256, 2 * 4 * 16 * 64 * 32
    assert hlo.product_flops(PRODUCTS, unknown_trips=(2,)) == 2 * 8 * (heads + plain + batch)


def test_loops_of_unknown_length_run_as_often_as_they_are_said_to_in_their_order():
    """The outer loop's end is not known, and a second one's after it."""
    second = PRODUCTS.replace("while(%t), condition=%open, body=%outer\n}", "while(%t), condition=%open, body=%outer\n"
                              "  %w.3 = (s32[], f32[8]) while(%w.1), condition=%open, body=%body\n}")  # fmt: skip
    once = hlo.product_flops(PRODUCTS, unknown_trips=(1,)) / 8
    assert hlo.product_flops(second, unknown_trips=(3, 5)) == (3 * 8 + 5) * once
    assert hlo.product_flops(second, unknown_trips=(3,)) == (3 * 8 + 3) * once


UNROLLED = """HloModule jit_step

%cond (p: (bf16[8,4], u32[])) -> pred[] {
  %end = u32[]{:T(128)} constant(7)
  %p.1 = (bf16[8,4]{1,0}, u32[]{:T(128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1, metadata={op_name="a loop" stack_frame_id=1}
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

%body (p: (bf16[8,4], u32[])) -> (bf16[8,4], u32[]) {
  %p.2 = (bf16[8,4]{1,0}, u32[]{:T(128)}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%p.2), index=0
  %i.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i.2, %two)
  %s = bf16[8,4]{1,0} collective-permute(%x), channel_id=9, source_target_pairs={{0,1}}
  ROOT %r = (bf16[8,4]{1,0}, u32[]{:T(128)}) tuple(%s, /*index=1*/%next)
}

ENTRY %main (p: (bf16[8,4], u32[])) -> (bf16[8,4], u32[]) {
  %w = (bf16[8,4]{1,0}, u32[]{:T(128)}) while(%p), condition=%cond, body=%body
}
"""


def test_a_loop_that_the_compiler_has_unrolled_runs_less_often():
    """0, 2, 4 and 6 are below 7."""
    (found,) = hlo.collectives(UNROLLED, unknown_trips=(1,))
    assert found.runs == 4
    (once_each,) = hlo.collectives(UNROLLED.replace("constant(2)", "constant(1)"), unknown_trips=(1,))
    assert once_each.runs == 7


# A step that reads one layer of three, writes a row of six, and hands a kernel a cache of four layers. S(1) is a TPU's
# fast memory.
TRAFFIC = """HloModule jit_decode

%sliced (p0: bf16[3,8,4], p1: s32[]) -> bf16[8,4] {
  %w.1 = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i.1 = s32[]{:T(128)} parameter(1)
  %cut = bf16[1,8,4]{2,1,0:T(8,128)(2,1)} dynamic-slice(%w.1, %i.1), dynamic_slice_sizes={1,8,4}
  ROOT %flat = bf16[8,4]{1,0:T(8,128)(2,1)} bitcast(%cut)
}

%product (p0: bf16[2,8], p1: bf16[3,8,4], p2: s32[]) -> bf16[2,4] {
  %x.2 = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w.2 = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} parameter(1)
  %i.2 = s32[]{:T(128)} parameter(2)
  %layer = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%w.2, %i.2), kind=kLoop, calls=%sliced
  ROOT %y.2 = bf16[2,4]{1,0:T(8,128)(2,1)S(1)} convolution(%x.2, %layer), dim_labels=bf_io->bf
}

%put (p0: f32[6,2], p1: f32[1,2], p2: s32[]) -> f32[6,2] {
  %ring.3 = f32[6,2]{1,0:T(8,128)} parameter(0)
  %new.3 = f32[1,2]{1,0:T(8,128)} parameter(1)
  %i.3 = s32[]{:T(128)} parameter(2)
  ROOT %ring.4 = f32[6,2]{1,0:T(8,128)} dynamic-update-slice(%ring.3, %new.3, %i.3)
}

%cond (p: (s32[], bf16[3,8,4], f32[6,2], bf16[4,2,2,16,8])) -> pred[] {
  %i.4 = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  %end = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.4, %end), direction=LT
}

%body (p: (s32[], bf16[3,8,4], f32[6,2], bf16[4,2,2,16,8])) -> (s32[], bf16[3,8,4], f32[6,2], bf16[4,2,2,16,8]) {
  %p.5 = (s32[]{:T(128)}, bf16[3,8,4]{2,1,0}, f32[6,2]{1,0}, bf16[4,2,2,16,8]{4,3,2,1,0}) parameter(0)
  %i.5 = s32[]{:T(128)S(1)} get-tuple-element(%p.5), index=0
  %w.5 = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p.5), index=1
  %ring.5 = f32[6,2]{1,0:T(8,128)} get-tuple-element(%p.5), index=2
  %kv.5 = bf16[4,2,2,16,8]{4,3,2,1,0:T(8,128)(2,1)} get-tuple-element(%p.5), index=3
  %x.5 = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} copy(%i.5)
  %y.5 = bf16[2,4]{1,0:T(8,128)(2,1)S(1)} fusion(%x.5, %w.5, %i.5), kind=kOutput, calls=%product
  %out.5 = f32[1,2]{1,0:T(8,128)} custom-call(%y.5, %kv.5), custom_call_target="tpu_custom_call"
  %ring.6 = f32[6,2]{1,0:T(8,128)} fusion(%ring.5, %out.5, %i.5), kind=kLoop, calls=%put
  ROOT %r = (s32[], bf16[3,8,4], f32[6,2], bf16[4,2,2,16,8]) tuple(%i.5, %w.5, %ring.6, %kv.5)
}

ENTRY %main (a: f32[100], t: (s32[], bf16[3,8,4], f32[6,2], bf16[4,2,2,16,8])) -> f32[100] {
  %a.7 = f32[100]{0:T(128)} parameter(0)
  %t.7 = (s32[]{:T(128)}, bf16[3,8,4]{2,1,0}, f32[6,2]{1,0}, bf16[4,2,2,16,8]{4,3,2,1,0}) parameter(1)
  %b.7 = f32[100]{0:T(128)} copy(%a.7)
  %s.7 = (f32[100]{0:T(128)}, f32[100]{0:T(128)S(1)}, u32[]) copy-start(%b.7)
  %d.7 = f32[100]{0:T(128)S(1)} copy-done(%s.7)
  %w.7 = (s32[], bf16[3,8,4], f32[6,2], bf16[4,2,2,16,8]) while(%t.7), condition=%cond, body=%body
  ROOT %e.7 = f32[100]{0:T(128)S(1)} add(%d.7, %d.7)
}
"""


def test_what_passes_between_a_chip_and_its_memory():
    layer, row, cache = 8 * 4 * 2, 2 * 4, 2 * 2 * 16 * 8 * 2
    step = layer + (cache + row) + (row + row)  # the kernel's result is written, read, and put into the ring
    once = 2 * 400 + 400  # copied, and then fetched
    assert hlo.memory_bytes(TRAFFIC, unknown_trips=(1,)) == 5 * step + once
    # A layer that is used whole besides is read whole.
    whole = TRAFFIC.replace("convolution(%x.2, %layer)", "convolution(%w.2, %layer)")
    assert hlo.memory_bytes(whole, unknown_trips=(1,)) == 5 * (step + 2 * layer) + once


def test_sums_by_kind():
    sums = hlo.by_kind(hlo.collectives(TPU, unknown_trips=(2,)))
    assert sums["collective-permute"] == {"count": 16, "bytes": 16 * 32}


@pytest.mark.parametrize(
    ("text", "size"),
    [("f32[2,3]{1,0}", 24), ("bf16[]", 2), ("pred[7]", 7), ("s8[5]", 5), ("f8e4m3fn[4]", 4), ("u64[2]", 16)],
)
def test_sizes_of_arrays(text, size):
    assert [count for _, count in hlo.array_bytes(text)] == [size]
