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
  double window;     // to gather 32 such vectors of a stem's windows
  double row_block;  // of the expansion's pixels that are multiplied together
  double step;       // and for every step of their sum
  double chunk;      // every chunk besides the expansion: barriers, projection, what the filter does once
  double tap;        // of the filter, for a lane's patch
  double copy;       // every chunk, to fetch weights
  double vector;     // and for 32 vectors of 16 bytes of them
  double store;      // once, of sums and biases
  double residual;   // once, if there is one
};

// By arithmetic (fp16, bf16, tf32, exact fp32), kColumnTiles and filter (as in filter.cuh).
// clang-format off
constexpr Issue kIssue[4][6][3] = {
    // counts: begin, nvcc 13.0
    {
        {{355, 80, 51, 363, 258, 44, 113, 54, 57, 12, 213, 68},  // half, 2 tiles, filter 0
         {358, 82, 51, 363, 258, 44, 114, 20, 57, 12, 211, 68},  // half, 2 tiles, filter 1
         {355, 81, 51, 363, 258, 44, 110, 23, 57, 12, 214, 68},  // half, 2 tiles, filter 2
        },
        {{359, 80, 51, 363, 258, 36, 118, 55, 58, 12, 306, 120},  // half, 3 tiles, filter 0
         {361, 81, 51, 363, 258, 36, 119, 20, 57, 12, 307, 144},  // half, 3 tiles, filter 1
         {359, 80, 51, 363, 258, 36, 115, 23, 58, 12, 307, 144},  // half, 3 tiles, filter 2
        },
        {{384, 80, 53, 364, 258, 44, 121, 54, 57, 12, 231, 116},  // half, 4 tiles, filter 0
         {379, 81, 53, 365, 258, 44, 122, 20, 57, 12, 231, 116},  // half, 4 tiles, filter 1
         {377, 80, 53, 363, 258, 44, 118, 23, 57, 12, 231, 116},  // half, 4 tiles, filter 2
        },
        {{373, 81, 51, 363, 258, 44, 143, 54, 57, 12, 353, 231},  // half, 8 tiles, filter 0
         {376, 81, 51, 363, 258, 44, 145, 20, 57, 12, 353, 231},  // half, 8 tiles, filter 1
         {374, 81, 51, 363, 258, 44, 141, 23, 57, 12, 353, 231},  // half, 8 tiles, filter 2
        },
        {{407, 81, 53, 363, 258, 44, 161, 54, 57, 12, 499, 312},  // half, 12 tiles, filter 0
         {410, 81, 53, 363, 258, 44, 162, 20, 57, 12, 499, 312},  // half, 12 tiles, filter 1
         {408, 81, 53, 363, 258, 44, 158, 23, 57, 12, 499, 312},  // half, 12 tiles, filter 2
        },
        {{385, 81, 51, 362, 134, 28, 139, 37, 57, 12, 378, 279},  // half, 20 tiles, filter 0
         {384, 80, 51, 363, 134, 28, 137, 12, 57, 12, 379, 279},  // half, 20 tiles, filter 1
         {384, 80, 51, 363, 134, 28, 137, 12, 57, 12, 379, 279},  // half, 20 tiles, filter 2
        },
    },
    {
        {{355, 81, 51, 363, 258, 44, 177, 104, 57, 12, 211, 68},  // bfloat16, 2 tiles, filter 0
         {359, 80, 50, 363, 258, 44, 211, 54, 57, 12, 211, 68},  // bfloat16, 2 tiles, filter 1
         {357, 80, 50, 363, 258, 44, 175, 73, 57, 12, 211, 68},  // bfloat16, 2 tiles, filter 2
        },
        {{360, 80, 51, 361, 258, 44, 182, 104, 57, 12, 310, 144},  // bfloat16, 3 tiles, filter 0
         {361, 80, 51, 361, 258, 44, 216, 54, 57, 12, 310, 144},  // bfloat16, 3 tiles, filter 1
         {359, 80, 51, 361, 258, 44, 180, 73, 57, 12, 310, 144},  // bfloat16, 3 tiles, filter 2
        },
        {{361, 80, 51, 362, 258, 44, 185, 104, 57, 12, 229, 115},  // bfloat16, 4 tiles, filter 0
         {360, 81, 51, 363, 258, 44, 219, 54, 57, 12, 229, 115},  // bfloat16, 4 tiles, filter 1
         {361, 80, 51, 362, 258, 44, 183, 73, 57, 12, 229, 115},  // bfloat16, 4 tiles, filter 2
        },
        {{373, 81, 51, 363, 258, 44, 207, 104, 57, 12, 353, 231},  // bfloat16, 8 tiles, filter 0
         {373, 80, 51, 362, 258, 44, 239, 54, 57, 12, 353, 207},  // bfloat16, 8 tiles, filter 1
         {373, 81, 51, 363, 258, 44, 206, 73, 57, 12, 353, 231},  // bfloat16, 8 tiles, filter 2
        },
        {{407, 81, 53, 363, 258, 44, 225, 104, 57, 12, 499, 312},  // bfloat16, 12 tiles, filter 0
         {410, 81, 53, 363, 258, 44, 259, 54, 57, 12, 499, 312},  // bfloat16, 12 tiles, filter 1
         {408, 81, 53, 363, 258, 44, 223, 73, 57, 12, 499, 312},  // bfloat16, 12 tiles, filter 2
        },
        {{385, 81, 51, 362, 134, 28, 172, 73, 57, 12, 378, 279},  // bfloat16, 20 tiles, filter 0
         {384, 80, 51, 363, 134, 28, 170, 38, 57, 12, 379, 279},  // bfloat16, 20 tiles, filter 1
         {384, 80, 51, 363, 134, 28, 170, 41, 57, 12, 379, 279},  // bfloat16, 20 tiles, filter 2
        },
    },
    {
        {{325, 81, 47, 318, 139, 102, 191, 59, 71, 12, 122, 30},  // tf32, 2 tiles, filter 0
         {355, 81, 51, 254, 134, 102, 183, 28, 58, 12, 120, 24},  // tf32, 2 tiles, filter 1
         {355, 81, 51, 253, 134, 102, 183, 29, 58, 12, 117, 24},  // tf32, 2 tiles, filter 2
        },
        {{327, 81, 47, 318, 139, 102, 216, 58, 71, 12, 163, 56},  // tf32, 3 tiles, filter 0
         {357, 80, 51, 253, 134, 102, 207, 28, 58, 12, 162, 44},  // tf32, 3 tiles, filter 1
         {357, 81, 51, 254, 134, 102, 207, 29, 58, 12, 162, 44},  // tf32, 3 tiles, filter 2
        },
        {{328, 81, 47, 318, 139, 102, 240, 58, 71, 12, 145, 20},  // tf32, 4 tiles, filter 0
         {349, 80, 51, 254, 139, 102, 234, 28, 72, 12, 142, 20},  // tf32, 4 tiles, filter 1
         {357, 81, 51, 255, 134, 102, 228, 29, 58, 12, 144, 20},  // tf32, 4 tiles, filter 2
        },
        {{371, 80, 51, 255, 134, 102, 326, 59, 58, 12, 185, 41},  // tf32, 8 tiles, filter 0
         {366, 80, 51, 254, 128, 102, 326, 28, 57, 12, 187, 41},  // tf32, 8 tiles, filter 1
         {366, 80, 51, 254, 128, 102, 326, 29, 57, 12, 187, 41},  // tf32, 8 tiles, filter 2
        },
        {{371, 82, 51, 254, 128, 98, 424, 59, 57, 12, 226, 62},  // tf32, 12 tiles, filter 0
         {371, 81, 51, 254, 128, 98, 422, 28, 57, 12, 226, 62},  // tf32, 12 tiles, filter 1
         {371, 81, 51, 254, 128, 98, 422, 29, 57, 12, 226, 62},  // tf32, 12 tiles, filter 2
        },
        {{386, 81, 51, 254, 128, 98, 616, 58, 57, 12, 301, 104},  // tf32, 20 tiles, filter 0
         {386, 81, 51, 254, 128, 98, 614, 28, 57, 12, 301, 104},  // tf32, 20 tiles, filter 1
         {386, 81, 51, 254, 128, 98, 614, 29, 57, 12, 301, 104},  // tf32, 20 tiles, filter 2
        },
    },
    {
        {{358, 80, 51, 253, 133, 419, 592, 58, 56, 12, 126, 24},  // float, 2 tiles, filter 0
         {362, 82, 51, 254, 133, 419, 595, 28, 56, 12, 126, 24},  // float, 2 tiles, filter 1
         {362, 82, 51, 254, 133, 419, 594, 29, 56, 12, 126, 24},  // float, 2 tiles, filter 2
        },
        {{355, 81, 51, 254, 126, 419, 750, 58, 56, 12, 162, 44},  // float, 3 tiles, filter 0
         {361, 80, 51, 253, 126, 419, 752, 28, 56, 12, 163, 44},  // float, 3 tiles, filter 1
         {364, 81, 51, 255, 126, 419, 752, 29, 56, 12, 165, 44},  // float, 3 tiles, filter 2
        },
        {{358, 81, 51, 254, 126, 419, 906, 59, 56, 12, 156, 17},  // float, 4 tiles, filter 0
         {362, 80, 51, 254, 126, 419, 903, 28, 56, 12, 154, 17},  // float, 4 tiles, filter 1
         {358, 80, 51, 254, 126, 419, 902, 29, 56, 12, 144, 17},  // float, 4 tiles, filter 2
        },
        {{369, 80, 51, 255, 126, 419, 1531, 58, 56, 12, 193, 35},  // float, 8 tiles, filter 0
         {367, 80, 51, 254, 126, 419, 1528, 28, 56, 12, 194, 35},  // float, 8 tiles, filter 1
         {366, 80, 51, 254, 126, 419, 1527, 29, 56, 12, 194, 35},  // float, 8 tiles, filter 2
        },
        {{375, 82, 51, 255, 132, 419, 2154, 59, 57, 12, 249, 53},  // float, 12 tiles, filter 0
         {375, 82, 51, 255, 132, 419, 2155, 28, 57, 12, 249, 53},  // float, 12 tiles, filter 1
         {376, 82, 51, 255, 132, 419, 2155, 29, 57, 12, 249, 53},  // float, 12 tiles, filter 2
        },
        {{391, 82, 51, 254, 132, 419, 3398, 59, 57, 12, 342, 89},  // float, 20 tiles, filter 0
         {392, 82, 51, 254, 132, 419, 3395, 28, 57, 12, 343, 89},  // float, 20 tiles, filter 1
         {391, 82, 51, 254, 132, 419, 3395, 29, 57, 12, 343, 89},  // float, 20 tiles, filter 2
        },
    },
    // counts: end
};
// clang-format on

}  // namespace cuda
}  // namespace mnv2
