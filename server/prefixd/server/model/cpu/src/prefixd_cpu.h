/* The CPU decoder of prefixd: a plain C interface over pointers.
 *
 * A decoder holds packed weights, the KV pool and its own threads. One call runs one forward pass
 * over a ragged batch: every row is a run of consecutive tokens of one sequence (or of one compiling
 * prefix) that attends over the blocks of its table. Nothing here knows torch or Python.
 *
 * Functions that can fail return 0 on success, else a nonzero value; pfx_error() then describes it
 * (per calling thread). A decoder is used by one thread at a time.
 */
#ifndef PREFIXD_CPU_H
#define PREFIXD_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PFX_ABI 4
#define PFX_EXPORT __attribute__((visibility("default")))

enum pfx_dtype { PFX_F32 = 0, PFX_BF16 = 1 };

/* Kernels, the later the faster. Each needs the processor features in its name. */
enum pfx_isa { PFX_PORTABLE = 0, PFX_AVX2 = 1, PFX_AVX512 = 2, PFX_AVX512_BF16 = 3, PFX_AMX = 4 };

/* Sizes of a decoder. Weights and KV have `dtype`; the residual stream, norms, softmax and all sums
 * are float32. */
typedef struct {
    int32_t dtype;
    int32_t num_layers, num_heads, num_kv_heads, head_dim;
    int32_t width;          /* of the residual stream */
    int32_t vocab;          /* rows of the head */
    int32_t embeddings;     /* rows of the embedding table */
    int32_t rotary_dim;     /* the first dimensions of a head that are rotated; even */
    int32_t max_positions;  /* rows of the rotary tables */
    int32_t block_size;     /* positions of a block; a multiple of 16 */
    float norm_eps, attention_scale;
} pfx_shape;

/* [out, in], row by row, in the decoder's dtype. `weight` NULL: absent. `bias` [out] may be NULL.
 *
 * `scales` [out] not NULL: `weight` is int8, -127 to 127, and stands for weight * scales of its row; the
 * bias stays in the decoder's dtype. The inputs are then rounded to int8 in each pass, every row of them
 * by itself with the scale max|x| / 127, and products are summed as integers. Of a row with NaN or
 * infinity all outputs are NaN. */
typedef struct {
    const void *weight, *bias;
    const float *scales;
} pfx_linear;

/* One layer; everything is copied (packed) by pfx_set_layer, and may be freed afterwards.
 *
 * Either gate, up and down are set (a dense MLP of `inner`), or router and the experts:
 * expert_gate_up [experts, 2 * expert_inner, width] with gate above up, expert_down
 * [experts, width, expert_inner], and optionally a shared expert of `inner` (gate, up, down and
 * shared_gate [1, width]) whose output, times sigmoid(shared_gate), is added.
 *
 * Any linear may have scales, but q, k and v all or none, and gate and up too. expert_gate_up_scales
 * [experts, 2 * expert_inner] and expert_down_scales [experts, width] are those of the experts. */
typedef struct {
    const void *input_norm, *post_norm;  /* [width] */
    const void *q_norm, *k_norm;         /* [head_dim], of each head before rotation; or NULL */
    pfx_linear q, k, v, o;
    pfx_linear gate, up, down;
    int32_t inner;
    int32_t experts, experts_per_token, expert_inner;
    int32_t normalize_weights;           /* the chosen experts' weights sum to 1 */
    const void *router;                  /* [experts, width] */
    const void *expert_gate_up, *expert_down;
    const float *expert_gate_up_scales, *expert_down_scales;
    const void *shared_gate;
} pfx_layer;

/* One forward pass. Flat tokens [num_tokens], the rows one after another. */
typedef struct {
    int32_t num_tokens;
    const int32_t *token_ids;    /* [num_tokens]; -1 where the input is the next row of `inputs` */
    const void *inputs;          /* [tokens of id -1, width] in the decoder's dtype */
    int32_t num_rows;
    const int32_t *offsets;      /* [num_rows] of the first token of each row in the flat tokens */
    const int32_t *lengths;      /* [num_rows] */
    const int32_t *starts;       /* [num_rows] position of the first token */
    const int32_t *tables;       /* [num_rows, table_width] block ids; entries past the end unread */
    int32_t table_width;
    int32_t num_outputs;
    const int32_t *outputs;      /* [num_outputs] flat tokens whose logits are wanted */
    float *logits;               /* [num_outputs, vocab] */
    int32_t *best;               /* [num_outputs] the id of the largest logit below `candidates` */
    float *best_value;           /* [num_outputs] that logit; NaN where any of them is NaN */
    int32_t candidates;          /* ids below it may be sampled */
    /* Gated prefixes, or all NULL. In the layers from gated_layers on, every token of a row attends to the first gated_counts positions of its gated_tables too, with a softmax of
     * their own; the result is added before the output projection. Rows of count 0 have nothing. */
    const int32_t *gated_counts;  /* [num_rows] */
    const int32_t *gated_layers;  /* [num_rows] */
    const int32_t *gated_tables;  /* [num_rows, gated_width] block ids */
    int32_t gated_width;
} pfx_step;

/* Counts since the decoder was made. Times in nanoseconds. */
typedef struct {
    int64_t steps;
    int64_t step_ns;       /* wall time in pfx_run */
    int64_t wait_ns;       /* of it, the calling thread's wait for other threads at barriers */
    int64_t late_steps;    /* steps in which a thread lost its core: an involuntary switch */
    int64_t threads;       /* that compute, at the end of the last step */
    int64_t thread_changes;  /* of that number, since pfx_set_threads */
} pfx_counters;

typedef struct pfx_decoder pfx_decoder;

PFX_EXPORT int32_t pfx_abi(void);
PFX_EXPORT const char *pfx_error(void);
/* Bit i is set where the build and the processor have enum pfx_isa i. Bit 0 is always set. */
PFX_EXPORT uint32_t pfx_available(void);
PFX_EXPORT const char *pfx_isa_name(int32_t isa);

/* NULL on failure. `isa` must be available. For PFX_F32, AVX512_BF16 and AMX mean AVX512. */
PFX_EXPORT pfx_decoder *pfx_new(const pfx_shape *shape, int32_t isa);
PFX_EXPORT void pfx_free(pfx_decoder *decoder);
/* cosine and sine [max_positions, rotary_dim / 2] in float32; copied. Dimension i is rotated with
 * dimension i + rotary_dim / 2. */
PFX_EXPORT int pfx_set_rotary(pfx_decoder *, const float *cosine, const float *sine);
PFX_EXPORT int pfx_set_layer(pfx_decoder *, int32_t layer, const pfx_layer *weights);
/* final_norm [width]; head [vocab, width] without scales. embedding [embeddings, width], or NULL where
 * it is the head: then rows are read from the packed head, and the table is not held twice. */
PFX_EXPORT int pfx_set_ends(pfx_decoder *, const void *final_norm, const pfx_linear *head,
                            const void *embedding);

/* Threads of a pass, the calling one included. They wait actively for at most `spin_us`
 * microseconds, then sleep. */
PFX_EXPORT int pfx_set_threads(pfx_decoder *, int32_t threads, int32_t spin_us);
PFX_EXPORT int pfx_run(pfx_decoder *, const pfx_step *step);
/* The keys and values [rows, num_kv_heads * head_dim] that a layer's products, with their biases, make
 * of inputs [rows, width] in the decoder's dtype: neither normalised nor rotated. */
PFX_EXPORT int pfx_project(pfx_decoder *, int32_t layer, const void *inputs, int32_t rows, float *keys,
                           float *values);
PFX_EXPORT void pfx_read_counters(const pfx_decoder *, pfx_counters *counters);
PFX_EXPORT int64_t pfx_num_bytes(const pfx_decoder *);  /* memory of weights and pool */

/* The KV pool: num_blocks blocks of zeros, block 0 included. Called once. */
PFX_EXPORT int pfx_set_pool(pfx_decoder *, int32_t num_blocks);
PFX_EXPORT int pfx_zero_blocks(pfx_decoder *, const int32_t *blocks, int32_t count);
PFX_EXPORT int pfx_copy_blocks(pfx_decoder *, const int32_t *sources, const int32_t *targets,
                               int32_t count);
/* Positions start .. start + count of a block table, to or from
 * kv [2 * num_layers, count, num_kv_heads * head_dim] in the decoder's dtype: keys (rotated) of
 * layer i at 2i, values at 2i + 1. */
PFX_EXPORT int pfx_write_kv(pfx_decoder *, const int32_t *table, int32_t start, int32_t count,
                            const void *kv);
PFX_EXPORT int pfx_read_kv(const pfx_decoder *, const int32_t *table, int32_t start, int32_t count,
                           void *kv);
/* Embedding rows [count, width] of token ids, in the decoder's dtype. */
PFX_EXPORT int pfx_read_embeddings(const pfx_decoder *, const int32_t *ids, int32_t count, void *out);

#ifdef __cplusplus
}
#endif
#endif
