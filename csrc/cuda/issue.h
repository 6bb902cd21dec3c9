// What a warp of the block kernel issues, for plans and predictions. bench/cuda_issue.py counts it in the machine code
// and writes the table; run it after every change of the kernel.
#pragma once

namespace mnv2 {
namespace cuda {

// Instructions of a warp on sm_90a.
struct Issue {
  double start;      // once, before the first chunk
  double place;      // for 32 pixels of the table of places
  double pixel;      // to copy 32 vectors of 16 bytes of the input
  double find;       // to find where 32 times four values of a stem's tile come from, if not dense
  double values;     // and to copy them, for every row
  double row_block;  // of the expansion's pixels that are multiplied together
  double step;       // and for every step of their sum
  double window;     // if these are a stem's windows
  double chunk;      // every chunk besides the expansion: barriers, projection, what the filter does once
  double tap;        // of the filter, for a lane's patch
  double copy;       // every chunk, of one warp alone: to fetch weights
  double store;      // once, of sums and biases
  double residual;   // once, if there is one
};

// By arithmetic (fp16, bf16, tf32, exact fp32), kColumnTiles and filter (as in filter.cuh).
// clang-format off
constexpr Issue kIssue[4][6][3] = {
    // counts: begin, nvcc 13.0
    {
        {{333, 114, 50, 148, 25, 76, 19, 41, 150, 54, 103, 215, 68},  // half, 2 tiles, filter 0
         {341, 114, 50, 148, 25, 82, 19, 41, 112, 20, 103, 215, 68},  // half, 2 tiles, filter 1
         {339, 115, 50, 148, 25, 82, 19, 41, 113, 23, 103, 217, 68},  // half, 2 tiles, filter 2
        },
        {{337, 114, 50, 148, 25, 76, 19, 41, 155, 54, 103, 304, 120},  // half, 3 tiles, filter 0
         {345, 114, 50, 148, 25, 82, 19, 41, 112, 20, 103, 304, 120},  // half, 3 tiles, filter 1
         {343, 115, 50, 148, 25, 82, 19, 41, 113, 23, 103, 304, 120},  // half, 3 tiles, filter 2
        },
        {{339, 113, 50, 149, 25, 76, 19, 41, 160, 54, 103, 229, 100},  // half, 4 tiles, filter 0
         {346, 114, 50, 148, 25, 82, 19, 41, 112, 20, 103, 231, 100},  // half, 4 tiles, filter 1
         {349, 114, 50, 148, 25, 82, 19, 41, 113, 23, 103, 230, 100},  // half, 4 tiles, filter 2
        },
        {{352, 114, 51, 149, 25, 76, 19, 41, 181, 54, 103, 352, 224},  // half, 8 tiles, filter 0
         {356, 114, 51, 149, 25, 82, 19, 41, 208, 20, 103, 351, 200},  // half, 8 tiles, filter 1
         {354, 114, 51, 149, 25, 82, 19, 41, 204, 23, 103, 352, 200},  // half, 8 tiles, filter 2
        },
        {{388, 116, 53, 149, 25, 77, 19, 41, 200, 54, 103, 485, 300},  // half, 12 tiles, filter 0
         {394, 117, 52, 149, 25, 83, 19, 41, 228, 20, 103, 485, 300},  // half, 12 tiles, filter 1
         {392, 116, 53, 149, 25, 83, 19, 41, 224, 23, 103, 485, 300},  // half, 12 tiles, filter 2
        },
        {{364, 113, 50, 149, 25, 56, 13, 25, 177, 38, 103, 399, 270},  // half, 20 tiles, filter 0
         {378, 113, 51, 150, 25, 62, 13, 25, 200, 12, 103, 412, 240},  // half, 20 tiles, filter 1
         {378, 113, 51, 150, 25, 62, 13, 25, 200, 12, 103, 412, 240},  // half, 20 tiles, filter 2
        },
    },
    {
        {{330, 114, 50, 149, 25, 76, 19, 41, 213, 104, 103, 215, 68},  // bfloat16, 2 tiles, filter 0
         {338, 114, 50, 149, 25, 82, 19, 41, 112, 54, 103, 219, 68},  // bfloat16, 2 tiles, filter 1
         {337, 115, 50, 150, 25, 82, 19, 41, 113, 73, 103, 217, 68},  // bfloat16, 2 tiles, filter 2
        },
        {{335, 114, 50, 149, 25, 76, 19, 41, 218, 104, 103, 306, 120},  // bfloat16, 3 tiles, filter 0
         {344, 114, 49, 149, 25, 82, 19, 41, 112, 54, 103, 305, 120},  // bfloat16, 3 tiles, filter 1
         {344, 114, 50, 149, 25, 82, 19, 41, 113, 73, 103, 306, 120},  // bfloat16, 3 tiles, filter 2
        },
        {{336, 114, 50, 149, 25, 76, 19, 41, 223, 104, 103, 230, 100},  // bfloat16, 4 tiles, filter 0
         {345, 114, 50, 149, 25, 82, 19, 41, 112, 54, 103, 230, 100},  // bfloat16, 4 tiles, filter 1
         {346, 114, 50, 149, 25, 82, 19, 41, 113, 73, 103, 230, 100},  // bfloat16, 4 tiles, filter 2
        },
        {{353, 114, 51, 149, 25, 76, 19, 41, 244, 104, 103, 353, 224},  // bfloat16, 8 tiles, filter 0
         {356, 114, 51, 149, 25, 82, 19, 41, 305, 54, 103, 351, 200},  // bfloat16, 8 tiles, filter 1
         {355, 114, 51, 149, 25, 82, 19, 41, 269, 73, 103, 351, 200},  // bfloat16, 8 tiles, filter 2
        },
        {{388, 116, 53, 149, 25, 77, 19, 41, 263, 104, 103, 485, 300},  // bfloat16, 12 tiles, filter 0
         {366, 116, 53, 149, 25, 83, 19, 41, 325, 54, 103, 485, 300},  // bfloat16, 12 tiles, filter 1
         {392, 116, 53, 149, 25, 83, 19, 41, 289, 73, 103, 485, 300},  // bfloat16, 12 tiles, filter 2
        },
        {{364, 113, 50, 149, 25, 56, 13, 25, 210, 74, 103, 399, 270},  // bfloat16, 20 tiles, filter 0
         {378, 113, 51, 150, 25, 62, 13, 25, 233, 38, 103, 412, 240},  // bfloat16, 20 tiles, filter 1
         {378, 113, 51, 150, 25, 62, 13, 25, 233, 41, 103, 412, 240},  // bfloat16, 20 tiles, filter 2
        },
    },
    {
        {{330, 108, 50, 149, 23, 95, 101, 96, 220, 59, 107, 143, 24},  // tf32, 2 tiles, filter 0
         {336, 108, 50, 149, 23, 95, 100, 96, 221, 28, 107, 142, 24},  // tf32, 2 tiles, filter 1
         {336, 108, 50, 149, 23, 95, 100, 96, 221, 29, 107, 142, 24},  // tf32, 2 tiles, filter 2
        },
        {{310, 108, 50, 149, 22, 96, 101, 99, 245, 60, 103, 189, 44},  // tf32, 3 tiles, filter 0
         {313, 108, 51, 149, 23, 96, 100, 99, 247, 28, 103, 189, 44},  // tf32, 3 tiles, filter 1
         {313, 108, 51, 149, 23, 96, 100, 99, 247, 29, 103, 189, 44},  // tf32, 3 tiles, filter 2
        },
        {{327, 108, 50, 149, 23, 96, 100, 99, 269, 59, 103, 180, 17},  // tf32, 4 tiles, filter 0
         {327, 108, 50, 149, 23, 96, 100, 99, 268, 28, 103, 180, 17},  // tf32, 4 tiles, filter 1
         {327, 108, 50, 149, 23, 96, 100, 99, 268, 29, 103, 180, 17},  // tf32, 4 tiles, filter 2
        },
        {{318, 108, 50, 149, 22, 96, 100, 99, 365, 60, 103, 217, 35},  // tf32, 8 tiles, filter 0
         {319, 108, 50, 149, 22, 96, 100, 99, 364, 28, 103, 221, 35},  // tf32, 8 tiles, filter 1
         {319, 108, 50, 149, 22, 96, 100, 99, 364, 29, 103, 221, 35},  // tf32, 8 tiles, filter 2
        },
        {{344, 108, 51, 149, 23, 96, 100, 99, 461, 59, 103, 269, 62},  // tf32, 12 tiles, filter 0
         {352, 108, 51, 150, 23, 95, 100, 96, 460, 28, 103, 268, 62},  // tf32, 12 tiles, filter 1
         {352, 108, 51, 150, 23, 95, 100, 96, 460, 29, 103, 268, 62},  // tf32, 12 tiles, filter 2
        },
        {{361, 108, 51, 149, 23, 96, 104, 101, 653, 59, 103, 330, 104},  // tf32, 20 tiles, filter 0
         {361, 108, 51, 149, 23, 96, 104, 101, 652, 28, 103, 327, 104},  // tf32, 20 tiles, filter 1
         {361, 108, 51, 149, 23, 96, 104, 101, 652, 29, 103, 327, 104},  // tf32, 20 tiles, filter 2
        },
    },
    {
        {{333, 108, 50, 149, 23, 105, 423, 442, 630, 60, 108, 130, 24},  // float, 2 tiles, filter 0
         {338, 108, 50, 149, 23, 105, 423, 442, 630, 28, 108, 130, 24},  // float, 2 tiles, filter 1
         {338, 108, 50, 149, 23, 105, 423, 442, 631, 29, 108, 130, 24},  // float, 2 tiles, filter 2
        },
        {{335, 108, 50, 149, 23, 101, 423, 442, 790, 60, 107, 191, 44},  // float, 3 tiles, filter 0
         {339, 108, 50, 149, 23, 101, 423, 443, 790, 28, 107, 191, 44},  // float, 3 tiles, filter 1
         {339, 108, 50, 149, 23, 101, 423, 443, 791, 29, 107, 191, 44},  // float, 3 tiles, filter 2
        },
        {{333, 108, 50, 149, 23, 101, 423, 443, 946, 60, 107, 169, 17},  // float, 4 tiles, filter 0
         {333, 108, 50, 149, 23, 101, 423, 443, 944, 28, 107, 169, 17},  // float, 4 tiles, filter 1
         {333, 108, 50, 149, 23, 101, 423, 443, 945, 29, 107, 169, 17},  // float, 4 tiles, filter 2
        },
        {{316, 108, 50, 152, 22, 102, 422, 445, 1571, 60, 103, 226, 35},  // float, 8 tiles, filter 0
         {341, 108, 50, 149, 23, 101, 422, 441, 1571, 28, 103, 224, 35},  // float, 8 tiles, filter 1
         {341, 108, 50, 149, 23, 101, 422, 441, 1571, 29, 103, 224, 35},  // float, 8 tiles, filter 2
        },
        {{344, 108, 51, 149, 23, 102, 422, 444, 2194, 59, 103, 276, 53},  // float, 12 tiles, filter 0
         {344, 108, 51, 149, 23, 102, 422, 444, 2193, 28, 103, 276, 53},  // float, 12 tiles, filter 1
         {344, 108, 51, 149, 23, 102, 422, 444, 2193, 29, 103, 276, 53},  // float, 12 tiles, filter 2
        },
        {{362, 108, 51, 149, 23, 102, 423, 448, 3436, 60, 103, 366, 89},  // float, 20 tiles, filter 0
         {362, 108, 51, 149, 23, 102, 423, 448, 3435, 28, 103, 366, 89},  // float, 20 tiles, filter 1
         {362, 108, 51, 149, 23, 102, 423, 448, 3435, 29, 103, 366, 89},  // float, 20 tiles, filter 2
        },
    },
    // counts: end
};
// clang-format on

}  // namespace cuda
}  // namespace mnv2
