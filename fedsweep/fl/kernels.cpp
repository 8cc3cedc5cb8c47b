// Training of one client in several experiments at once, on a CPU. See docs/performance.md.
//
// A tile is T lanes (experiments) that train on the same images in the same order. Every quantity that has w units or
// channels a lane is a row of w * T columns, column u * T + l being unit u of lane l, padded to whole vectors. So most
// of the work does not know of lanes at all: a linear layer, a convolution, batch norm and the optimiser run down
// columns. Only what a unit of the layer before sends on differs by lane: the same T numbers, repeated over a vector
// (`pattern`). With T = 1 the vectors are full of units, with T = 16 and one unit of lanes.
//
// No column is ever added to another but in loops over units in their order, and every sum over rows runs in an order
// that depends on the shape alone. So a lane's numbers are the same bit for bit whatever T is and whoever sits beside it.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef SCALAR
#define SCALAR float
#endif

namespace {

typedef SCALAR S;
constexpr int BYTES = 64;
constexpr int VL = BYTES / sizeof(S);
constexpr bool IS_FLOAT = sizeof(S) == 4;
typedef S vec __attribute__((vector_size(BYTES)));
typedef S loose __attribute__((vector_size(BYTES), aligned(sizeof(S)), may_alias));
typedef std::conditional_t<IS_FLOAT, int32_t, int64_t> I;
typedef I ivec __attribute__((vector_size(BYTES)));

typedef double unaligned_double __attribute__((aligned(4), may_alias));

inline vec all(S x) { return x - vec{}; }
inline vec load(const S* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(S* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
inline vec positive(vec v) { return v <= 0 ? vec{} : v; }  // ReLU; nan stays nan

template <int P, std::size_t... i>
inline vec repeat(const S* p, std::index_sequence<i...>) {
  typedef S part __attribute__((vector_size(P * sizeof(S)), aligned(sizeof(S)), may_alias));
  const part t = *reinterpret_cast<const part*>(p);
  return __builtin_shufflevector(t, t, (int(i) % P)...);
}

// The P numbers at p, again and again.
template <int P>
inline vec pattern(const S* p) {
  if constexpr (P == 1) return all(*p);
  else if constexpr (P == VL) return load(p);
#ifdef __AVX512F__  // one instruction each, which the compiler does not find by itself
  else if constexpr (P * sizeof(S) == 8) return (vec)_mm512_set1_pd(*reinterpret_cast<const unaligned_double*>(p));
  else if constexpr (P * sizeof(S) == 16)
    return (vec)_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
  else if constexpr (P * sizeof(S) == 32)
    return (vec)_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(p)));
#endif
  else return repeat<P>(p, std::make_index_sequence<VL>());
}

template <int N>
struct Factorials {  // 1 / k!
  double of[N + 1] = {1};
  constexpr Factorials() {
    for (int k = 1; k <= N; ++k) of[k] = of[k - 1] / k;
  }
};

// e to the x, for x <= 0; nan stays nan. Within 2 units in the last place.
inline vec exp_of(vec x) {
  const S lowest = IS_FLOAT ? -87 : -708;
  x = x < lowest ? all(lowest) : x;
  const vec scaled = x * S(1.4426950408889634074);
  const ivec whole = __builtin_convertvector(scaled - S(0.5), ivec);  // towards zero, and x <= 0: the nearest
  const vec n = __builtin_convertvector(whole, vec);
  const vec r = IS_FLOAT ? (x - n * S(0.693359375)) - n * S(-2.12194440e-4)
                         : (x - n * S(6.93147180369123816490e-01)) - n * S(1.90821492927058770002e-10);
  constexpr int TERMS = IS_FLOAT ? 8 : 14;
  constexpr Factorials<TERMS> inverse;
  vec sum = all(S(inverse.of[TERMS]));
  for (int k = TERMS; k > 0; --k) sum = sum * r + S(inverse.of[k - 1]);
  const ivec power = (whole + (IS_FLOAT ? 127 : 1023)) << (IS_FLOAT ? 23 : 52);
  vec two_to_n;
  std::memcpy(&two_to_n, &power, sizeof power);
  return sum * two_to_n;
}

template <int apart, std::size_t... i>
inline void exchange(vec& a, vec& b, std::index_sequence<i...>) {
  const vec upper = __builtin_shufflevector(a, b, (int(i) & apart ? VL + int(i) - apart : int(i))...);
  b = __builtin_shufflevector(a, b, (int(i) & apart ? VL + int(i) : int(i) + apart)...);
  a = upper;
}

// A square block in place: quarters change places, then those of the quarters, and so on (Eklundh 1972).
template <int apart>
inline void transpose(vec* rows) {
  for (int i = 0; i < VL; ++i)
    if (!(i & apart)) exchange<apart>(rows[i], rows[i + apart], std::make_index_sequence<VL>());
  if constexpr (apart > 1) transpose<apart / 2>(rows);
}

// ---- columns and parameters

constexpr int WINOGRAD_WIDTH = 32;  // channels from which on the transforms cost less than they save
constexpr int POINTS = 16;          // numbers of a transformed tile
constexpr int MOST_TILES = 64;      // at once, so that they stay in the second cache

struct Columns {
  int real = 0, nv = 1, blocks = 1;  // columns in use; vectors a block; blocks
  int cb() const { return nv * VL; }
  int padded() const { return blocks * cb(); }
};

Columns columns(int real, int most = 4) {
  const int vectors = (real + VL - 1) / VL;
  Columns best;
  double least = std::numeric_limits<double>::infinity();
  for (int nv = 1; nv <= most; ++nv) {
    const int blocks = (vectors + nv - 1) / nv;
    const double cost = blocks * nv * (1 + 0.5 / nv);  // padding costs, and so do narrow blocks
    if (cost < least) least = cost, best = Columns{real, nv, blocks};
  }
  return best;
}

// A matrix of rows whose columns may lie in several blocks, each block a matrix of its own.
struct Operand {
  const S* p;
  std::ptrdiff_t ld, block_stride;
  int k_per_block;
};

struct Layer {
  int k = 0;      // inputs of a unit; for a convolution 9 for each input channel
  int units = 0;
  Columns c;
  std::size_t w = 0, bias = 0, gamma = 0, beta = 0;  // places in the parameters, in numbers
  std::size_t mean = 0, var = 0;                     // places in the running statistics
  int side = 1, out_side = 1;                        // of a convolution, before and after pooling
  bool pools = false;
  bool by_points = false;  // whether its convolution is one of transformed tiles

  // Pixels in a line of its padded input: a border of zeros all around, and an even number.
  int padded() const { return side + 2 + side % 2; }
  int tiles_in_line() const { return (side + 1) / 2; }
  int lines_at_once() const {  // of tiles
    return std::min(tiles_in_line(), std::max(1, MOST_TILES / tiles_in_line()));
  }
};

// ---- kernels: P numbers repeat, NV vectors wide, R rows at once

template <int P, int NV, int R>
void gemm_rows(Operand x, const S* w, int k, const S* bias, S* out, std::ptrdiff_t ldo) {
  vec sum[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) sum[r][v] = bias ? load(bias + v * VL) : vec{};
  for (int k0 = 0; k0 < k; k0 += x.k_per_block, x.p += x.block_stride) {
    const int count = std::min(x.k_per_block, k - k0);
    for (int kk = 0; kk < count; ++kk, w += NV * VL) {
      vec weight[NV];
      for (int v = 0; v < NV; ++v) weight[v] = load(w + v * VL);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vec in = pattern<P>(x.p + r * x.ld + kk * P);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] += in * weight[v];
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * ldo + v * VL, sum[r][v]);
}

template <int P, int NV, int R>
void wgrad_rows(const S* x, std::ptrdiff_t ld, const S* dz, int rows, S* dw, bool adds) {
  vec sum[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) sum[r][v] = adds ? load(dw + (r * NV + v) * VL) : vec{};
  for (int b = 0; b < rows; ++b, x += ld, dz += NV * VL) {
    vec d[NV];
    for (int v = 0; v < NV; ++v) d[v] = load(dz + v * VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec in = pattern<P>(x + r * P);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] += in * d[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(dw + (r * NV + v) * VL, sum[r][v]);
}

// R pixels of a row of a 3x3 convolution. x is at the upper left of the first pixel's window.
template <int P, int NV, int R>
void conv_pixels(const S* x, std::ptrdiff_t pixel, std::ptrdiff_t line, const S* w, int channels, const S* bias, S* out) {
  vec sum[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) sum[r][v] = bias ? load(bias + v * VL) : vec{};
  for (int c = 0; c < channels; ++c, x += P)
    for (int ky = 0; ky < 3; ++ky)
      for (int kx = 0; kx < 3; ++kx, w += NV * VL) {
        const S* at = x + ky * line + kx * pixel;
        vec weight[NV];
        for (int v = 0; v < NV; ++v) weight[v] = load(w + v * VL);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const vec in = pattern<P>(at + r * pixel);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) sum[r][v] += in * weight[v];
        }
      }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(out + (r * NV + v) * VL, sum[r][v]);
}

// Weight gradient of CI input channels and KY rows of the window, added to dw, over some lines of an image.
template <int P, int NV, int CI, int KY>
void conv_wgrad_lines(const S* x, std::ptrdiff_t pixel, std::ptrdiff_t line, const S* dz, std::ptrdiff_t dz_line,
                      int lines, int side, S* dw) {
  vec sum[CI][KY][3][NV] = {};
  for (int h = 0; h < lines; ++h) {
    const S* d = dz + h * dz_line;
    const S* at = x + h * line;
    for (int i = 0; i < side; ++i, d += NV * VL, at += pixel) {
      vec g[NV];
      for (int v = 0; v < NV; ++v) g[v] = load(d + v * VL);
#pragma GCC unroll 2
      for (int c = 0; c < CI; ++c)
#pragma GCC unroll 3
        for (int ky = 0; ky < KY; ++ky)
#pragma GCC unroll 3
          for (int kx = 0; kx < 3; ++kx) {
            const vec in = pattern<P>(at + c * P + ky * line + kx * pixel);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[c][ky][kx][v] += in * g[v];
          }
    }
  }
  for (int c = 0; c < CI; ++c)
    for (int ky = 0; ky < KY; ++ky)
      for (int kx = 0; kx < 3; ++kx)
        for (int v = 0; v < NV; ++v) {
          S* to = dw + ((c * 9 + ky * 3 + kx) * NV + v) * VL;
          store(to, load(to) + sum[c][ky][kx][v]);
        }
}

// ---- 3x3 convolutions of 2x2 pixels at once with 16 products in place of 36: F(2x2, 3x3) of Lavin & Gray (2016),
// "Fast algorithms for convolutional neural networks". Each transform is done first to the columns, then to the rows.

template <int From, int To, class F>
inline void both_ways(const vec* in, vec* out, F transform) {
  vec half[To * From];
  for (int c = 0; c < From; ++c) transform(in + c, From, half + c, From);
  for (int r = 0; r < To; ++r) transform(half + r * From, 1, out + r * To, 1);
}

// 4x4 pixels to points; `a` and `b` are the distances between numbers.
inline void pixels_to_points(const vec* in, vec* out) {
  both_ways<4, 4>(in, out, [](const vec* d, int a, vec* to, int b) {
    to[0] = d[0] - d[2 * a], to[b] = d[a] + d[2 * a], to[2 * b] = d[2 * a] - d[a], to[3 * b] = d[a] - d[3 * a];
  });
}

inline void points_to_pixels(const vec* in, vec* out) {  // 2x2
  both_ways<4, 2>(in, out, [](const vec* m, int a, vec* to, int b) {
    to[0] = m[0] + m[a] + m[2 * a], to[b] = m[a] - m[2 * a] - m[3 * a];
  });
}

inline void weights_to_points(const vec* in, vec* out) {  // 3x3
  both_ways<3, 4>(in, out, [](const vec* g, int a, vec* to, int b) {
    const vec outer = (g[0] + g[2 * a]) * S(0.5), middle = g[a] * S(0.5);
    to[0] = g[0], to[b] = outer + middle, to[2 * b] = outer - middle, to[3 * b] = g[2 * a];
  });
}

inline void gradient_to_points(const vec* in, vec* out) {  // that of 2x2 pixels
  both_ways<2, 4>(in, out, [](const vec* d, int a, vec* to, int b) {
    to[0] = d[0], to[b] = d[0] + d[a], to[2 * b] = d[0] - d[a], to[3 * b] = -d[a];
  });
}

inline void points_to_weights(const vec* in, vec* out) {  // the gradient of 3x3 weights
  both_ways<4, 3>(in, out, [](const vec* x, int a, vec* to, int b) {
    const vec sum = (x[a] + x[2 * a]) * S(0.5);
    to[0] = x[0] + sum, to[b] = (x[a] - x[2 * a]) * S(0.5), to[2 * b] = sum + x[3 * a];
  });
}

// ---- the same for any number of rows: as many at once as the registers hold, then fewer

template <int P, int NV, int R, int... Fewer>
struct Rows {
  static void gemm(Operand x, const S* w, int k, const S* bias, S* out, std::ptrdiff_t ldo, int rows) {
    for (; rows >= R; rows -= R, x.p += R * x.ld, out += R * ldo) gemm_rows<P, NV, R>(x, w, k, bias, out, ldo);
    if constexpr (sizeof...(Fewer) > 0)
      if (rows) Rows<P, NV, Fewer...>::gemm(x, w, k, bias, out, ldo, rows);
  }
  static void wgrad(const S* x, std::ptrdiff_t ld, const S* dz, int rows, S* dw, int k, bool adds) {
    for (; k >= R; k -= R, x += R * P, dw += R * NV * VL) wgrad_rows<P, NV, R>(x, ld, dz, rows, dw, adds);
    if constexpr (sizeof...(Fewer) > 0)
      if (k) Rows<P, NV, Fewer...>::wgrad(x, ld, dz, rows, dw, k, adds);
  }
  static void conv(const S* x, std::ptrdiff_t pixel, std::ptrdiff_t line, const S* w, int channels, const S* bias,
                   S* out, int pixels) {
    for (; pixels >= R; pixels -= R, x += R * pixel, out += R * NV * VL)
      conv_pixels<P, NV, R>(x, pixel, line, w, channels, bias, out);
    if constexpr (sizeof...(Fewer) > 0)
      if (pixels) Rows<P, NV, Fewer...>::conv(x, pixel, line, w, channels, bias, out, pixels);
  }
};

template <int P, int NV>
using Tiled = std::conditional_t<NV <= 2, Rows<P, NV, 14, 7, 2, 1>,
                                 std::conditional_t<NV == 3, Rows<P, NV, 7, 4, 2, 1>, Rows<P, NV, 6, 4, 2, 1>>>;

template <int P, int NV>
void conv_wgrad(const S* x, std::ptrdiff_t pixel, std::ptrdiff_t line, const S* dz, std::ptrdiff_t dz_line, int lines,
                int side, S* dw, int channels) {
  constexpr int CI = NV == 2 ? 1 : 2, KY = NV <= 2 ? 3 : 1;
  int c = 0;
  for (; c + CI <= channels; c += CI)
    for (int ky = 0; ky < 3; ky += KY)
      conv_wgrad_lines<P, NV, CI, KY>(x + c * P + ky * line, pixel, line, dz, dz_line, lines, side,
                                      dw + (c * 9 + ky * 3) * NV * VL);
  for (; c < channels; ++c)
    for (int ky = 0; ky < 3; ky += KY)
      conv_wgrad_lines<P, NV, 1, KY>(x + c * P + ky * line, pixel, line, dz, dz_line, lines, side,
                                     dw + (c * 9 + ky * 3) * NV * VL);
}

struct Kernels {
  void (*gemm)(Operand, const S*, int, const S*, S*, std::ptrdiff_t, int);
  void (*wgrad)(const S*, std::ptrdiff_t, const S*, int, S*, int, bool);
  void (*conv)(const S*, std::ptrdiff_t, std::ptrdiff_t, const S*, int, const S*, S*, int);
  void (*conv_wgrad)(const S*, std::ptrdiff_t, std::ptrdiff_t, const S*, std::ptrdiff_t, int, int, S*, int);
};

template <int P, int NV>
constexpr Kernels of() {
  typedef Tiled<P, NV> T;
  return {T::gemm, T::wgrad, T::conv, conv_wgrad<P, NV>};
}

template <int P>
const Kernels& wide(int nv) {
  static constexpr Kernels table[4] = {of<P, 1>(), of<P, 2>(), of<P, 3>(), of<P, 4>()};
  return table[nv - 1];
}

const Kernels& kernels(int p, int nv) {
  switch (p) {
    case 1: return wide<1>(nv);
    case 2: return wide<2>(nv);
    case 4: return wide<4>(nv);
    case 8: return wide<8>(nv);
    default: return wide<VL>(nv);
  }
}

// ---- a tile

struct Shape {
  int32_t is_cnn, width, depth, classes, channels, side, batch, lanes;
};

constexpr int AHEAD = 4;  // images, and labels, lie anywhere in memory: ask for those of so many images later
constexpr S EPS = S(1e-5);
constexpr S STAT_MOMENTUM = S(0.1);

struct Arena {  // hands out 64-byte aligned pieces; without memory it only counts
  char* base;
  std::size_t used = 0;
  S* take(std::size_t numbers) {
    S* piece = base ? reinterpret_cast<S*>(base + used) : nullptr;
    used += (numbers * sizeof(S) + 4 * BYTES) / BYTES * BYTES;  // apart, so that pieces do not meet in one cache set
    return piece;
  }
};

struct Tile {
  Shape s;
  int T;
  std::vector<Layer> hidden;
  Layer last;
  std::size_t num_params = 0, num_stats = 0;
  const S* w;  // the weights now: packed global ones, then `trained`
  S *trained, *v, *g, *stats, *x, *logits, *wide_in, *wide_grad, *turned, *pad_in, *pad_dz;
  S *weight_points, *grad_points, *in_points, *out_points;  // of transformed tiles: point by point
  std::vector<S*> z, a, mean, inv, scale, shift;
  S *da[2], *sums;
  int image_size;

  Tile(const Shape& shape, char* memory, bool trains) : s(shape), T(shape.lanes) {
    image_size = s.channels * s.side * s.side;
    plan();
    Arena arena{memory};
    trained = trains ? arena.take(num_params) : nullptr;
    v = trains ? arena.take(num_params) : nullptr;
    g = trains ? arena.take(num_params) : nullptr;
    stats = arena.take(num_stats);
    const std::size_t B = s.batch;
    x = arena.take(B * image_size);
    logits = arena.take(B * last.c.padded());
    std::size_t largest_pad = 0, largest_turned = 0, largest_da = 1, largest_group = 0, largest_points = 0;
    for (Layer& layer : hidden) {
      const std::size_t pixels = s.is_cnn ? layer.side * layer.side : 1;
      const std::size_t columns = layer.c.padded();
      z.push_back(arena.take(B * pixels * columns));
      a.push_back(s.is_cnn ? nullptr : arena.take(B * columns));
      mean.push_back(arena.take(columns));
      inv.push_back(arena.take(columns));
      scale.push_back(arena.take(columns));
      shift.push_back(arena.take(columns));
      const std::size_t out_pixels = s.is_cnn ? layer.out_side * layer.out_side : 1;
      largest_da = std::max(largest_da, B * out_pixels * columns);
      largest_pad = std::max(largest_pad, std::size_t(layer.padded() * layer.padded()) * columns);
      if (layer.by_points) {
        const std::size_t tiles = layer.lines_at_once() * layer.tiles_in_line();
        largest_group = std::max(largest_group, POINTS * tiles * columns);
        largest_points = POINTS * std::size_t(s.width) * columns;
      }
      largest_turned = std::max(largest_turned, std::size_t(layer.units) * (s.is_cnn ? 9 : 1) * columns);
    }
    if (!hidden.empty()) {
      const Layer& top = hidden.back();
      const Columns c = columns_of_last_input();
      wide_in = s.is_cnn ? arena.take(B * last.k * T) : nullptr;
      wide_grad = s.is_cnn && trains ? arena.take(B * c.padded()) : nullptr;
      largest_turned = std::max(largest_turned, std::size_t(last.units) * (s.is_cnn ? c.padded() : top.c.padded()));
      const int padded = hidden.front().padded();
      pad_in = arena.take(std::max(largest_pad, std::size_t(padded * padded * s.channels)));
      pad_dz = trains ? arena.take(largest_pad) : nullptr;
      turned = trains ? arena.take(largest_turned) : nullptr;
      da[0] = trains ? arena.take(largest_da) : nullptr;
      da[1] = trains ? arena.take(largest_da) : nullptr;
      sums = arena.take(2 * top.c.padded());
      weight_points = arena.take(largest_points);
      grad_points = trains ? arena.take(largest_points) : nullptr;
      in_points = arena.take(largest_group);
      out_points = arena.take(largest_group);
    }
    bytes = arena.used;
  }
  std::size_t bytes = 0;

  void begin(const S* packed) {
    w = packed;
    std::memcpy(stats, packed + num_params, num_stats * sizeof(S));
  }

  Columns columns_of_last_input() const { return columns(last.k * T); }

  void place(Layer& layer, int k, int units, bool has_norm) {
    layer.k = k, layer.units = units;
    layer.w = num_params, num_params += std::size_t(k) * layer.c.padded();
    layer.bias = num_params, num_params += layer.c.padded();
    if (!has_norm) return;
    layer.gamma = num_params, num_params += layer.c.padded();
    layer.beta = num_params, num_params += layer.c.padded();
    layer.mean = num_stats, num_stats += layer.c.padded();
    layer.var = num_stats, num_stats += layer.c.padded();
  }

  void plan() {
    int inputs = s.is_cnn ? s.channels : image_size, side = s.side;
    for (int i = 0; i < s.depth; ++i) {
      Layer layer;
      layer.c = columns(s.width * T);
      place(layer, s.is_cnn ? 9 * inputs : inputs, s.width, true);
      layer.side = side;
      layer.pools = s.is_cnn && i % 2 == 1 && side > 1;
      layer.by_points = s.is_cnn && i > 0 && s.width >= WINOGRAD_WIDTH;
      if (layer.pools) side /= 2;
      layer.out_side = side;
      hidden.push_back(layer);
      inputs = s.width;
    }
    last.c = columns(s.classes * T);
    const int features = s.depth == 0 ? image_size : s.is_cnn ? s.width * side * side : s.width;
    place(last, features, s.classes, false);
  }

  // -- between PyTorch's order of one lane and ours of T

  // Calls matrix(place in a lane's row, layer) and vector(place in a lane's row, place among ours, units) for all that
  // a model is made of; statistics come after the parameters.
  template <class Matrix, class Vector>
  void each_part(Matrix matrix, Vector vector) const {
    std::size_t at = 0;
    auto part = [&](std::size_t place, int units) { vector(at, place, units), at += units; };
    for (const Layer& layer : hidden) {
      matrix(at, layer), at += std::size_t(layer.units) * layer.k;
      for (const std::size_t place : {layer.bias, layer.gamma, layer.beta}) part(place, layer.units);
      for (const std::size_t place : {layer.mean, layer.var}) part(num_params + place, layer.units);
    }
    matrix(at, last), at += std::size_t(last.units) * last.k;
    part(last.bias, last.units);
  }

  // Weights of T lanes in our order, padded with zeros.
  void pack(const S* const* rows, S* packed) const {
    std::fill(packed, packed + num_params + num_stats, S(0));
    each_part(
        [&](std::size_t from, const Layer& layer) {
          const int cb = layer.c.cb();
          for (int u = 0; u < layer.units; ++u) {
            S* to = packed + layer.w + std::size_t(u * T / cb) * layer.k * cb + u * T % cb;
            for (int k = 0; k < layer.k; ++k, to += cb, ++from)
              for (int l = 0; l < T; ++l) to[l] = rows[l][from];
          }
        },
        [&](std::size_t from, std::size_t to, int units) {
          for (int u = 0; u < units; ++u)
            for (int l = 0; l < T; ++l) packed[to + u * T + l] = rows[l][from + u];
        });
  }

  // The other way, from the weights and statistics now; lanes without a row are left out. Says of each lane whether all
  // its numbers are finite.
  void unpack(S* const* rows, uint8_t* finite) const {
    S seen[VL] = {};  // 0 as long as they are
    each_part([&](std::size_t to, const Layer& layer) { unpack_matrix(rows, to, layer, seen); },
              [&](std::size_t to, std::size_t from, int units) {
                const S* ours = from < num_params ? w + from : stats + (from - num_params);
                for (int u = 0; u < units; ++u)
                  for (int l = 0; l < T; ++l) {
                    seen[l] += ours[u * T + l] * 0;
                    if (rows[l]) rows[l][to + u] = ours[u * T + l];
                  }
              });
    for (int l = 0; l < T; ++l) finite[l] = seen[l] == 0;
  }

  void unpack_matrix(S* const* rows, std::size_t to, const Layer& layer, S* seen) const {
    const int cb = layer.c.cb();
    for (int c = 0; c < layer.c.real; c += VL) {
      const S* ours = w + layer.w + std::size_t(c / cb) * layer.k * cb + c % cb;
      vec zero = {};
      for (int k = 0; k < layer.k; k += VL) {
        const int count = std::min(VL, layer.k - k);
        vec block[VL];
        for (int i = 0; i < VL; ++i) {
          block[i] = i < count ? load(ours + std::size_t(k + i) * cb) : vec{};
          zero += block[i] * S(0);
        }
        transpose<VL / 2>(block);
        for (int i = 0; i < VL && c + i < layer.c.real; ++i) {
          S* row = rows[(c + i) % T];
          if (!row) continue;
          row += to + std::size_t((c + i) / T) * layer.k + k;
          if (count == VL) store(row, block[i]);
          else std::memcpy(row, &block[i], count * sizeof(S));
        }
      }
      for (int i = 0; i < VL && c + i < layer.c.real; ++i) seen[(c + i) % T] += zero[i];
    }
  }

  // -- forward

  void gather(const uint8_t* images, const S* table, const int64_t* order, int rows) {
    auto image_at = [&](int b) { return images + std::size_t(order ? order[b] : b) * image_size; };
    for (int b = 0; b < rows; ++b) {
      if (b + AHEAD < rows)
        for (int i = 0; i < image_size; i += BYTES) __builtin_prefetch(image_at(b + AHEAD) + i);
      const uint8_t* __restrict image = image_at(b);
      const S* __restrict known = table;
      S* __restrict to = x + std::size_t(b) * image_size;
      for (int i = 0; i < image_size; ++i) to[i] = known[image[i]];
    }
  }

  Operand input_of(int layer) const {  // of a linear layer
    if (layer == 0) return {x, image_size, 0, image_size};
    if (s.is_cnn) return {wide_in, std::ptrdiff_t(last.k) * T, 0, last.k};
    const Columns& c = hidden[layer - 1].c;
    return {a[layer - 1], c.cb(), std::ptrdiff_t(s.batch) * c.cb(), c.cb() / T};
  }

  void linear(const Operand& in, int p, const Layer& layer, S* out, int rows) const {
    const int cb = layer.c.cb();
    for (int j = 0; j < layer.c.blocks; ++j)
      kernels(p, layer.c.nv)
          .gemm(in, w + layer.w + std::size_t(j) * layer.k * cb, layer.k, w + layer.bias + j * cb,
                out + std::size_t(j) * s.batch * cb, cb, rows);
  }

  void note_statistics(const Layer& layer, int i, int column, vec m, vec var, S count) {
    const vec inverse = rsqrt(var + EPS);
    store(mean[i] + column, m);
    store(inv[i] + column, inverse);
    S* running_mean = stats + layer.mean + column;
    S* running_var = stats + layer.var + column;
    store(running_mean, load(running_mean) * (1 - STAT_MOMENTUM) + m * STAT_MOMENTUM);
    store(running_var, load(running_var) * (1 - STAT_MOMENTUM) + var * (count / (count - 1)) * STAT_MOMENTUM);
    set_scale(layer, i, column, m, inverse);
  }

  void set_scale(const Layer& layer, int i, int column, vec m, vec inverse) {
    const vec factor = load(w + layer.gamma + column) * inverse;
    store(scale[i] + column, factor);
    store(shift[i] + column, load(w + layer.beta + column) - m * factor);
  }

  static vec rsqrt(vec x) {
    for (int k = 0; k < VL; ++k) x[k] = S(1) / std::sqrt(x[k]);
    return x;
  }

  void use_running_statistics() {
    for (std::size_t i = 0; i < hidden.size(); ++i)
      for (int c = 0; c < hidden[i].c.padded(); c += VL)
        set_scale(hidden[i], i, c, load(stats + hidden[i].mean + c), rsqrt(load(stats + hidden[i].var + c) + EPS));
  }

  void forward(int rows, bool trains) {
    if (s.is_cnn && s.depth > 0) forward_cnn(rows, trains);
    else
      for (int i = 0; i < s.depth; ++i) forward_linear(i, rows, trains);
    linear(input_of(s.depth), s.depth == 0 ? 1 : T, last, logits, rows);
  }

  void forward_linear(int i, int rows, bool trains) {
    const Layer& layer = hidden[i];
    linear(input_of(i), i == 0 ? 1 : T, layer, z[i], rows);
    const int cb = layer.c.cb();
    for (int c = 0; c < layer.c.padded(); c += VL) {
      S* own = z[i] + std::size_t(c / cb) * s.batch * cb + c % cb;
      S* out = a[i] + (own - z[i]);
      vec sum = {};
      for (int b = 0; b < rows; ++b) {
        const vec r = positive(load(own + b * cb));
        store(own + b * cb, r);
        sum += r;
      }
      if (trains) {
        const vec m = sum / S(rows);
        vec squares = {};
        for (int b = 0; b < rows; ++b) {
          const vec d = load(own + b * cb) - m;
          squares += d * d;
        }
        note_statistics(layer, i, c, m, squares / S(rows), rows);
      }
      const vec factor = load(scale[i] + c), offset = load(shift[i] + c);
      for (int b = 0; b < rows; ++b) store(out + b * cb, load(own + b * cb) * factor + offset);
    }
  }

  void clear_border(S* pad, const Layer& layer, int cb) const {
    std::fill(pad, pad + std::size_t(layer.padded()) * layer.padded() * cb, S(0));
  }

  void pad_image(int b) const {  // the image itself, channels last
    const int line = hidden.front().padded();
    for (int c = 0; c < s.channels; ++c) {
      const S* from = x + std::size_t(b) * image_size + c * s.side * s.side;
      for (int h = 0; h < s.side; ++h)
        for (int i = 0; i < s.side; ++i)
          pad_in[((h + 1) * line + i + 1) * s.channels + c] = from[h * s.side + i];
    }
  }

  // What the layer above sees of layer i for image b: normalised, ReLU, pooled. `line` numbers lie between lines.
  void activate(int i, int b, S* out, std::ptrdiff_t line) const {
    const Layer& layer = hidden[i];
    const int cb = layer.c.cb(), side = layer.side, n = layer.out_side;
    const S* own = z[i] + std::size_t(b) * side * side * cb;
    for (int c = 0; c < cb; c += VL) {
      const vec factor = load(scale[i] + c), offset = load(shift[i] + c);
      auto y = [&](int h, int k) { return load(own + (h * side + k) * cb + c) * factor + offset; };
      for (int h = 0; h < n; ++h)
        for (int k = 0; k < n; ++k) {
          vec value;
          if (layer.pools) {
            value = y(2 * h, 2 * k);
            for (const vec other : {y(2 * h, 2 * k + 1), y(2 * h + 1, 2 * k), y(2 * h + 1, 2 * k + 1)})
              value = other > value ? other : value;
          } else {
            value = y(h, k);
          }
          store(out + h * line + k * cb + c, positive(value));
        }
    }
  }

  // The input of convolution i for image b, with a border of zeros, in pad_in.
  void input_image(int i, int b) const {
    if (i == 0) return pad_image(b);
    const int cb = hidden[i].c.cb(), line = hidden[i].padded();
    activate(i - 1, b, pad_in + (line + 1) * cb, std::ptrdiff_t(line) * cb);
  }

  void convolve(const S* pad, int p, int pixel, int channels, const Layer& layer, const S* weights, const S* bias,
                S* out) const {
    const int side = layer.side, cb = layer.c.cb();
    const std::ptrdiff_t line = std::ptrdiff_t(layer.padded()) * pixel;
    const auto conv = kernels(p, layer.c.nv).conv;
    for (int h = 0; h < side; ++h)
      conv(pad + h * line, pixel, line, weights, channels, bias, out + std::ptrdiff_t(h) * side * cb, side);
  }

  // -- convolutions of transformed tiles; `points` numbers lie between a number's points

  void turn_into_points(const Layer& layer, const S* weights) const {
    const int cb = layer.c.cb();
    const std::ptrdiff_t points = std::ptrdiff_t(s.width) * cb;
    for (int u = 0; u < s.width; ++u)
      for (int c = 0; c < cb; c += VL) {
        vec own[9], at[POINTS];
        for (int tap = 0; tap < 9; ++tap) own[tap] = load(weights + (u * 9 + tap) * cb + c);
        weights_to_points(own, at);
        for (int n = 0; n < POINTS; ++n) store(weight_points + n * points + u * cb + c, at[n]);
      }
  }

  // Points of some lines of tiles, from `first` on: transform(the tile's upper left number, between pixels, between
  // lines, its points) makes them.
  template <class F>
  void each_tile(const S* pad, const Layer& layer, int first, int lines, S* out, F transform) const {
    const int cb = layer.c.cb(), across = layer.tiles_in_line();
    const std::ptrdiff_t line = std::ptrdiff_t(layer.padded()) * cb, points = std::ptrdiff_t(lines) * across * cb;
    for (int h = 0; h < lines; ++h)
      for (int k = 0; k < across; ++k, out += cb)
        for (int c = 0; c < cb; c += VL) {
          vec to[POINTS];
          transform(pad + 2 * (first + h) * line + 2 * k * cb + c, cb, line, to);
          for (int n = 0; n < POINTS; ++n) store(out + n * points + c, to[n]);
        }
  }

  void points_of_image(const S* pad, const Layer& layer, int first, int lines) const {
    each_tile(pad, layer, first, lines, in_points, [](const S* at, int pixel, std::ptrdiff_t line, vec* to) {
      vec own[16];
      for (int n = 0; n < 16; ++n) own[n] = load(at + n / 4 * line + n % 4 * pixel);
      pixels_to_points(own, to);
    });
  }

  void points_of_gradient(const Layer& layer, int first, int lines) const {
    each_tile(pad_dz, layer, first, lines, out_points, [](const S* at, int pixel, std::ptrdiff_t line, vec* to) {
      at += line + pixel;  // within the border
      const vec own[4] = {load(at), load(at + pixel), load(at + line), load(at + line + pixel)};
      gradient_to_points(own, to);
    });
  }

  void image_of_points(const Layer& layer, int first, int lines, const S* bias, S* out) const {
    const int cb = layer.c.cb(), side = layer.side, across = layer.tiles_in_line();
    const std::ptrdiff_t points = std::ptrdiff_t(lines) * across * cb;
    const S* from = out_points;
    for (int h = 2 * first; h < 2 * (first + lines); h += 2)
      for (int k = 0; k < side; k += 2, from += cb)
        for (int c = 0; c < cb; c += VL) {
          vec own[POINTS], to[4];
          for (int n = 0; n < POINTS; ++n) own[n] = load(from + n * points + c);
          points_to_pixels(own, to);
          const vec more = bias ? load(bias + c) : vec{};
          for (int n = 0; n < 4; ++n)
            if (h + n / 2 < side && k + n % 2 < side)
              store(out + std::ptrdiff_t((h + n / 2) * side + k + n % 2) * cb + c, to[n] + more);
        }
  }

  // Calls f(first line of tiles, lines, tiles) for as many tiles at once as fit.
  template <class F>
  static void each_group(const Layer& layer, F f) {
    const int across = layer.tiles_in_line(), most = layer.lines_at_once();
    for (int h = 0; h < across; h += most) {
      const int lines = std::min(most, across - h);
      f(h, lines, lines * across);
    }
  }

  // A convolution with the weights in `weight_points`.
  void convolve_by_points(const S* pad, const Layer& layer, const S* bias, S* out) const {
    const int cb = layer.c.cb();
    const auto gemm = kernels(T, layer.c.nv).gemm;
    each_group(layer, [&](int h, int lines, int tiles) {
      points_of_image(pad, layer, h, lines);
      for (int n = 0; n < POINTS; ++n)
        gemm({in_points + n * tiles * cb, cb, 0, s.width}, weight_points + n * s.width * cb, s.width, nullptr,
             out_points + n * tiles * cb, cb, tiles);
      image_of_points(layer, h, lines, bias, out);
    });
  }

  // Adds the weight gradient of the image in pad_in and pad_dz to that in `grad_points`.
  void add_grad_points(const Layer& layer) {
    const int cb = layer.c.cb();
    const auto wgrad = kernels(T, layer.c.nv).wgrad;
    each_group(layer, [&](int h, int lines, int tiles) {
      points_of_image(pad_in, layer, h, lines);
      points_of_gradient(layer, h, lines);
      for (int n = 0; n < POINTS; ++n)
        wgrad(in_points + n * tiles * cb, cb, out_points + n * tiles * cb, tiles, grad_points + n * s.width * cb,
              s.width, true);
    });
  }

  void turn_from_points(const Layer& layer) {
    const int cb = layer.c.cb();
    const std::ptrdiff_t points = std::ptrdiff_t(s.width) * cb;
    for (int u = 0; u < s.width; ++u)
      for (int c = 0; c < cb; c += VL) {
        vec at[POINTS], own[9];
        for (int n = 0; n < POINTS; ++n) at[n] = load(grad_points + n * points + u * cb + c);
        points_to_weights(at, own);
        for (int tap = 0; tap < 9; ++tap) store(g + layer.w + (u * 9 + tap) * cb + c, own[tap]);
      }
  }

  void forward_cnn(int rows, bool trains) {
    for (int i = 0; i < s.depth; ++i) {
      const Layer& layer = hidden[i];
      const int cb = layer.c.cb(), pixels = layer.side * layer.side;
      const int pixel = i == 0 ? s.channels : cb;
      clear_border(pad_in, layer, pixel);
      if (layer.by_points) turn_into_points(layer, w + layer.w);
      std::vector<vec> middle(layer.c.nv, vec{}), squares(layer.c.nv, vec{});
      for (int b = 0; b < rows; ++b) {
        input_image(i, b);
        S* out = z[i] + std::size_t(b) * pixels * cb;
        if (layer.by_points) convolve_by_points(pad_in, layer, w + layer.bias, out);
        else convolve(pad_in, i == 0 ? 1 : T, pixel, layer.k / 9, layer, w + layer.w, w + layer.bias, out);
        if (trains) add_statistics(out, pixels, cb, b, middle, squares);
      }
      if (!trains) continue;
      const S count = S(rows) * pixels;
      for (int n = 0; n < layer.c.nv; ++n) note_statistics(layer, i, n * VL, middle[n], squares[n] / count, count);
    }
    flatten(rows);
  }

  // Mean and sum of squared deviations, image after image (Chan, Golub & LeVeque 1979).
  static void add_statistics(const S* image, int pixels, int cb, int before, std::vector<vec>& middle,
                             std::vector<vec>& squares) {
    for (std::size_t n = 0; n < middle.size(); ++n) {
      const S* own = image + n * VL;
      vec sum = {}, deviation = {};
      for (int p = 0; p < pixels; ++p) sum += load(own + p * cb);
      const vec m = sum / S(pixels);
      for (int p = 0; p < pixels; ++p) {
        const vec d = load(own + p * cb) - m;
        deviation += d * d;
      }
      const vec apart = m - middle[n];
      middle[n] += apart / S(before + 1);
      squares[n] += deviation + apart * apart * (S(before) * S(pixels) / S(before + 1));
    }
  }

  void flatten(int rows) {  // activations of the last convolution as rows of features, channel after channel
    const Layer& top = hidden.back();
    const int cb = top.c.cb(), n = top.out_side * top.out_side;
    for (int b = 0; b < rows; ++b) {
      activate(s.depth - 1, b, pad_in, std::ptrdiff_t(top.out_side) * cb);
      S* row = wide_in + std::size_t(b) * last.k * T;
      for (int u = 0; u < s.width; ++u)
        for (int p = 0; p < n; ++p) std::memcpy(row + (u * n + p) * T, pad_in + p * cb + u * T, T * sizeof(S));
    }
  }

  // -- loss and backward

  // Logits become the gradient of the mean cross-entropy.
  void loss_gradient(const int64_t* const* labels, const int64_t* order, int rows) {
    switch (T) {
      case 1: return loss_gradient_of<1>(labels, order, rows);
      case 2: return loss_gradient_of<2>(labels, order, rows);
      case 4: return loss_gradient_of<4>(labels, order, rows);
      case 8: return loss_gradient_of<8>(labels, order, rows);
      default: return loss_gradient_of<VL>(labels, order, rows);
    }
  }

  template <int P>
  void loss_gradient_of(const int64_t* const* labels, const int64_t* order, int rows) {
    typedef S part __attribute__((vector_size(P * sizeof(S)), aligned(sizeof(S)), may_alias));  // one class, P lanes
    const int cb = last.c.cb();
    const S share = S(1) / S(rows);
    for (int b = 0; b < rows; ++b) {
      auto at = [&](int column) { return logits + (std::size_t(column / cb) * s.batch + b) * cb + column % cb; };
      for (int l = 0; l < P; ++l) __builtin_prefetch(&labels[l][order[std::min(b + AHEAD, rows - 1)]]);
      auto lanes = [&](int u) -> part& { return *reinterpret_cast<part*>(at(u * P)); };
      part most = lanes(0);
      for (int u = 1; u < s.classes; ++u) most = lanes(u) > most ? lanes(u) : most;
      const vec largest = pattern<P>(reinterpret_cast<const S*>(&most));
      for (int c = 0; c < last.c.padded(); c += VL) store(at(c), exp_of(load(at(c)) - largest));
      for (int c = last.c.real; c < last.c.padded(); ++c) *at(c) = 0;
      part total = {};
      for (int u = 0; u < s.classes; ++u) total += lanes(u);
      const part factor = share / total;
      for (int u = 0; u < s.classes; ++u) lanes(u) *= factor;
      for (int l = 0; l < P; ++l) at(int(labels[l][order[b]]) * P)[l] -= share;
    }
  }

  void column_sums(const S* rows_of, int rows, const Columns& c, S* out) const {
    const int cb = c.cb();
    for (int column = 0; column < c.padded(); column += VL) {
      const S* own = rows_of + std::size_t(column / cb) * s.batch * cb + column % cb;
      vec sum = {};
      for (int b = 0; b < rows; ++b) sum += load(own + b * cb);
      store(out + column, sum);
    }
  }

  void linear_wgrad(const Operand& in, int p, const Layer& layer, const S* dz, int rows) {
    const int cb = layer.c.cb();
    for (int j = 0; j < layer.c.blocks; ++j)
      for (int k = 0, block = 0; k < layer.k; k += in.k_per_block, ++block)
        kernels(p, layer.c.nv)
            .wgrad(in.p + block * in.block_stride, in.ld, dz + std::size_t(j) * s.batch * cb, rows,
                   g + layer.w + (std::size_t(j) * layer.k + k) * cb, std::min(in.k_per_block, layer.k - k), false);
    column_sums(dz, rows, layer.c, g + layer.bias);
  }

  // The weights of a linear layer with inputs and units exchanged, as columns `c` of its inputs.
  void turn(const Layer& layer, const Columns& c) const {
    const int cb = layer.c.cb(), to = c.cb();
    for (int u = 0; u < layer.units; ++u)
      for (int k = 0; k < layer.k; ++k) {
        const S* from = w + layer.w + (std::size_t(u * T / cb) * layer.k + k) * cb + u * T % cb;
        std::memcpy(turned + (std::size_t(k * T / to) * layer.units + u) * to + k * T % to, from, T * sizeof(S));
      }
  }

  // Gradient of the inputs of a linear layer, as columns `c`.
  void linear_input_grad(const Layer& layer, const S* dz, const Columns& c, S* out, int rows) const {
    turn(layer, c);
    const Operand in{dz, layer.c.cb(), std::ptrdiff_t(s.batch) * layer.c.cb(), layer.c.cb() / T};
    for (int j = 0; j < c.blocks; ++j)
      kernels(T, c.nv).gemm(in, turned + std::size_t(j) * layer.units * c.cb(), layer.units, nullptr,
                            out + std::size_t(j) * s.batch * c.cb(), c.cb(), rows);
  }

  void backward(int rows) {
    linear_wgrad(input_of(s.depth), s.depth == 0 ? 1 : T, last, logits, rows);
    if (s.depth == 0) return;
    if (s.is_cnn) return backward_cnn(rows);
    S* grad = da[0];
    linear_input_grad(last, logits, hidden.back().c, grad, rows);
    for (int i = s.depth - 1; i >= 0; --i) {
      norm_backward(i, grad, rows);
      linear_wgrad(input_of(i), i == 0 ? 1 : T, hidden[i], grad, rows);
      if (i == 0) break;
      S* below = grad == da[0] ? da[1] : da[0];
      linear_input_grad(hidden[i], grad, hidden[i - 1].c, below, rows);
      grad = below;
    }
  }

  void norm_backward(int i, S* grad, int rows) {  // from batch norm's output to before the ReLU
    const Layer& layer = hidden[i];
    const int cb = layer.c.cb();
    for (int c = 0; c < layer.c.padded(); c += VL) {
      S* d = grad + std::size_t(c / cb) * s.batch * cb + c % cb;
      const S* r = z[i] + (d - grad);
      const vec m = load(mean[i] + c), inverse = load(inv[i] + c);
      vec sum = {}, dot = {};
      for (int b = 0; b < rows; ++b) {
        const vec dy = load(d + b * cb);
        sum += dy;
        dot += dy * ((load(r + b * cb) - m) * inverse);
      }
      store(g + layer.beta + c, sum);
      store(g + layer.gamma + c, dot);
      const vec factor = load(scale[i] + c), sum_share = sum / S(rows), dot_share = dot / S(rows) * inverse;
      for (int b = 0; b < rows; ++b) {
        const vec own = load(r + b * cb);
        const vec dr = factor * (load(d + b * cb) - sum_share - (own - m) * dot_share);
        store(d + b * cb, own <= 0 ? vec{} : dr);
      }
    }
  }

  // Calls f(pixel, gradient of batch norm's output there) for every pixel of layer i in image b, given that of the
  // pooled ReLU: a window's goes to its first largest pixel.
  template <class F>
  void each_gradient(int i, int b, const S* grad, int c, F f) const {
    const Layer& layer = hidden[i];
    const int cb = layer.c.cb(), side = layer.side, n = layer.out_side;
    const S* own = z[i] + std::size_t(b) * side * side * cb + c;
    const S* d = grad + std::size_t(b) * n * n * cb + c;
    const vec factor = load(scale[i] + c), offset = load(shift[i] + c);
    auto y = [&](int p) { return load(own + p * cb) * factor + offset; };
    if (!layer.pools) {
      for (int p = 0; p < n * n; ++p) f(p, y(p) <= 0 ? vec{} : load(d + p * cb));
      return;
    }
    for (int h = 0; h < n; ++h)
      for (int k = 0; k < n; ++k) {
        const int p = 2 * h * side + 2 * k;
        const vec y0 = y(p), y1 = y(p + 1), y2 = y(p + side), y3 = y(p + side + 1);
        const vec top = y1 > y0 ? y1 : y0, low = y3 > y2 ? y3 : y2;
        const vec value = low > top ? low : top;
        const vec dy = value <= 0 ? vec{} : load(d + (h * n + k) * cb);
        const vec in_top = low > top ? vec{} : dy, in_low = low > top ? dy : vec{};
        f(p, y1 > y0 ? vec{} : in_top);
        f(p + 1, y1 > y0 ? in_top : vec{});
        f(p + side, y3 > y2 ? vec{} : in_low);
        f(p + side + 1, y3 > y2 ? in_low : vec{});
      }
    for (int h = 0; h < side; ++h)  // what no window covers, where the side is odd
      for (int k = h < 2 * n ? 2 * n : 0; k < side; ++k) f(h * side + k, vec{});
  }

  // Adds image b to the sums over batch norm's gradient, and over its product with the normalised values.
  void add_sums(int i, int b, const S* grad) {
    const Layer& layer = hidden[i];
    const int cb = layer.c.cb();
    const S* own = z[i] + std::size_t(b) * layer.side * layer.side * cb;
    for (int c = 0; c < cb; c += VL) {
      const vec m = load(mean[i] + c);
      vec sum = {}, dot = {};
      each_gradient(i, b, grad, c, [&](int p, vec dy) {
        sum += dy;
        dot += dy * (load(own + p * cb + c) - m);
      });
      store(sums + c, load(sums + c) + sum);
      store(sums + cb + c, load(sums + cb + c) + dot * load(inv[i] + c));
    }
  }

  void backward_cnn(int rows) {
    const Columns c = columns_of_last_input();
    linear_input_grad(last, logits, c, wide_grad, rows);
    std::fill(da[0], da[0] + std::size_t(rows) * hidden.back().out_side * hidden.back().out_side * hidden.back().c.cb(),
              S(0));
    unflatten(rows, c, da[0]);
    const int cb = hidden.back().c.cb();
    std::fill(sums, sums + 2 * cb, S(0));
    for (int b = 0; b < rows; ++b) add_sums(s.depth - 1, b, da[0]);
    S* grad = da[0];
    for (int i = s.depth - 1; i >= 0; --i) {
      S* below = grad == da[0] ? da[1] : da[0];
      conv_backward(i, grad, below, rows);
      grad = below;
    }
  }

  void unflatten(int rows, const Columns& c, S* grad) const {
    const Layer& top = hidden.back();
    const int cb = top.c.cb(), n = top.out_side * top.out_side;
    for (int b = 0; b < rows; ++b)
      for (int u = 0; u < s.width; ++u)
        for (int p = 0; p < n; ++p) {
          const int column = (u * n + p) * T;
          const S* from = wide_grad + (std::size_t(column / c.cb()) * s.batch + b) * c.cb() + column % c.cb();
          std::memcpy(grad + (std::size_t(b) * n + p) * cb + u * T, from, T * sizeof(S));
        }
  }

  void conv_backward(int i, const S* grad, S* below, int rows) {
    const Layer& layer = hidden[i];
    const int cb = layer.c.cb(), side = layer.side, channels = layer.k / 9, pixel = i == 0 ? s.channels : cb;
    const std::ptrdiff_t line = std::ptrdiff_t(layer.padded()) * pixel, dz_line = std::ptrdiff_t(layer.padded()) * cb;
    std::memcpy(g + layer.beta, sums, cb * sizeof(S));
    std::memcpy(g + layer.gamma, sums + cb, cb * sizeof(S));
    std::fill(g + layer.w, g + layer.w + std::size_t(layer.k) * cb, S(0));
    std::fill(g + layer.bias, g + layer.bias + cb, S(0));
    std::fill(sums, sums + 2 * cb, S(0));
    clear_border(pad_in, layer, pixel);
    clear_border(pad_dz, layer, cb);
    if (i > 0) turn_convolution(layer);
    if (layer.by_points) {
      turn_into_points(layer, turned);
      std::fill(grad_points, grad_points + std::size_t(POINTS) * s.width * cb, S(0));
    }
    const auto wgrad = kernels(i == 0 ? 1 : T, layer.c.nv).conv_wgrad;
    const int band = s.width >= 32 ? 2 : 4;  // lines at once, so that they stay in the first cache
    for (int b = 0; b < rows; ++b) {
      norm_backward_image(i, b, grad, S(rows) * side * side);
      input_image(i, b);
      S* out = below + std::size_t(b) * side * side * cb;
      if (layer.by_points) {
        add_grad_points(layer);
        convolve_by_points(pad_dz, layer, nullptr, out);
        add_sums(i - 1, b, below);
        continue;
      }
      for (int h = 0; h < side; h += band)
        wgrad(pad_in + h * line, pixel, line, pad_dz + (h + 1) * dz_line + cb, dz_line, std::min(band, side - h), side,
              g + layer.w, channels);
      if (i == 0) continue;
      convolve(pad_dz, T, cb, s.width, layer, turned, nullptr, out);
      add_sums(i - 1, b, below);
    }
    if (layer.by_points) turn_from_points(layer);
  }

  void norm_backward_image(int i, int b, const S* grad, S count) {  // to before batch norm, in pad_dz
    const Layer& layer = hidden[i];
    const int cb = layer.c.cb(), side = layer.side;
    const S* own = z[i] + std::size_t(b) * side * side * cb;
    for (int c = 0; c < cb; c += VL) {
      const vec m = load(mean[i] + c), factor = load(scale[i] + c), sum_share = load(g + layer.beta + c) / count;
      const vec dot_share = load(g + layer.gamma + c) / count * load(inv[i] + c);
      vec total = {};
      each_gradient(i, b, grad, c, [&](int p, vec dy) {
        const vec dz = factor * (dy - sum_share - (load(own + p * cb + c) - m) * dot_share);
        store(pad_dz + ((p / side + 1) * layer.padded() + p % side + 1) * cb + c, dz);
        total += dz;
      });
      store(g + layer.bias + c, load(g + layer.bias + c) + total);
    }
  }

  void turn_convolution(const Layer& layer) const {
    const int cb = layer.c.cb();
    std::fill(turned, turned + std::size_t(9) * s.width * cb, S(0));
    for (int u = 0; u < s.width; ++u)
      for (int c = 0; c < s.width; ++c)
        for (int tap = 0; tap < 9; ++tap)
          std::memcpy(turned + (u * 9 + 8 - tap) * cb + c * T, w + layer.w + (c * 9 + tap) * cb + u * T, T * sizeof(S));
  }

  // -- optimiser

  void add_squares(std::size_t base, int k, const Columns& c, double* squares) const {
    for (int column = 0; column < c.padded(); column += VL) {
      const S* own = g + base + std::size_t(column / c.cb()) * k * c.cb() + column % c.cb();
      vec sum = {};
      for (int i = 0; i < k; ++i) {
        const vec each = load(own + std::size_t(i) * c.cb());
        sum += each * each;
      }
      for (int n = 0; n < VL && column + n < c.real; ++n) squares[(column + n) % T] += double(sum[n]);
    }
  }

  // settings: learning rate, momentum, weight decay and largest norm of each lane.
  void step(const S* const* settings, bool is_first, bool is_last) {
    const S* max_norm = settings[3];
    double squares[VL] = {};
    for (const Layer& layer : hidden) {
      add_squares(layer.w, layer.k, layer.c, squares);
      for (const std::size_t base : {layer.bias, layer.gamma, layer.beta}) add_squares(base, 1, layer.c, squares);
    }
    add_squares(last.w, last.k, last.c, squares);
    add_squares(last.bias, 1, last.c, squares);
    vec rate, keep, shrink, clip;
    for (int n = 0; n < VL; ++n) {
      const int l = n % T;
      const S norm = S(std::sqrt(squares[l]));
      const S factor = std::isinf(max_norm[l]) ? S(1) : max_norm[l] / (norm + S(1e-6));
      clip[n] = factor > 1 ? S(1) : factor;
      rate[n] = settings[0][l], keep[n] = settings[1][l], shrink[n] = settings[2][l];
    }
    for (std::size_t i = 0; i < num_params; i += VL) {
      const vec weight = load(w + i);
      vec velocity = clip * load(g + i) + shrink * weight;
      if (!is_first) velocity += keep * load(v + i);
      if (!is_last) store(v + i, velocity);
      store(trained + i, weight - rate * velocity);
    }
    w = trained;
  }
};

}  // namespace

extern "C" {

int fedsweep_vector_length() { return VL; }

std::size_t fedsweep_workspace(const Shape* shape, int trains) { return Tile(*shape, nullptr, trains).bytes; }

// Numbers that the packed weights of a tile have.
std::size_t fedsweep_packed(const Shape* shape) {
  const Tile tile(*shape, nullptr, false);
  return tile.num_params + tile.num_stats;
}

// The global weights of a tile's lanes, in PyTorch's order, to those that the kernels take.
void fedsweep_pack(const Shape* shape, const S* const* weights, S* packed) {
  Tile(*shape, nullptr, false).pack(weights, packed);
}

// The training of some clients in a round, one after another, for the lanes of a tile: from the packed global weights
// to each client's own, for which `out` has T places a client, as has `finite`. An order has as many places as samples, `epochs` times.
void fedsweep_train(const Shape* shape, const uint8_t* images, const S* table, int64_t clients,
                    const int64_t* const* orders, const int64_t* epochs, const int64_t* samples,
                    const int64_t* const* labels, const S* packed, S* const* out, uint8_t* finite,
                    const S* const* settings, char* workspace) {
  Tile tile(*shape, workspace, true);
  for (int64_t c = 0; c < clients; ++c) {
    tile.begin(packed);
    const int64_t in_epoch = samples[c] / shape->batch + (samples[c] % shape->batch > 1);
    int64_t done = 0;
    for (int64_t epoch = 0; epoch < epochs[c]; ++epoch)
      for (int64_t first = 0; first < samples[c]; first += shape->batch) {
        const int rows = int(std::min<int64_t>(shape->batch, samples[c] - first));
        if (rows == 1) continue;  // batch norm has no variance there
        const int64_t* batch = orders[c] + epoch * samples[c] + first;
        tile.gather(images, table, batch, rows);
        tile.forward(rows, true);
        tile.loss_gradient(labels, batch, rows);
        tile.backward(rows);
        tile.step(settings, done == 0, done + 1 == epochs[c] * in_epoch);
        ++done;
      }
    tile.unpack(out + c * tile.T, finite + c * tile.T);
  }
}

// Logits of images by the models of a tile, with running statistics.
void fedsweep_logits(const Shape* shape, const uint8_t* images, const S* table, int64_t count, const S* packed,
                     S* const* out, char* workspace) {
  Tile tile(*shape, workspace, false);
  tile.begin(packed);
  tile.use_running_statistics();
  const int cb = tile.last.c.cb();
  for (int64_t first = 0; first < count; first += shape->batch) {
    const int rows = int(std::min<int64_t>(shape->batch, count - first));
    tile.gather(images + first * tile.image_size, table, nullptr, rows);
    tile.forward(rows, false);
    for (int b = 0; b < rows; ++b)
      for (int u = 0; u < shape->classes; ++u) {
        const S* at = tile.logits + (std::size_t(u * tile.T / cb) * shape->batch + b) * cb + u * tile.T % cb;
        for (int l = 0; l < tile.T; ++l)
          if (out[l]) out[l][(first + b) * shape->classes + u] = at[l];
      }
  }
}

// The mean of some rows of numbers, weighted, in double precision and one row after another.
void fedsweep_mean(int64_t count, const S* const* rows, const double* shares, int64_t numbers, S* out) {
  constexpr int BLOCK = 1024;
  double whole = 0;
  for (int64_t r = 0; r < count; ++r) whole += shares[r];
  for (int64_t first = 0; first < numbers; first += BLOCK) {
    const int n = int(std::min<int64_t>(BLOCK, numbers - first));
    double sum[BLOCK] = {};
    for (int64_t r = 0; r < count; ++r) {
      const S *row = rows[r] + first, *next = rows[std::min(r + 1, count - 1)] + first;
      int i = 0;
      for (; i + VL <= n; i += VL) {
        __builtin_prefetch(next + i);
        for (int k = i; k < i + VL; ++k) sum[k] += shares[r] * double(row[k]);
      }
      for (; i < n; ++i) sum[i] += shares[r] * double(row[i]);
    }
    for (int i = 0; i < n; ++i) out[first + i] = S(sum[i] / whole);
  }
}
}
