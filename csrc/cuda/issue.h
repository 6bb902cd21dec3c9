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
        {{301, 68, 39, 148, 25, 77, 19, 41, 146, 55, 103, 214, 68},  // half, 2 tiles, filter 0
         {309, 68, 39, 148, 25, 77, 19, 41, 118, 20, 103, 214, 68},  // half, 2 tiles, filter 1
         {308, 68, 39, 148, 25, 77, 19, 41, 119, 23, 103, 214, 68},  // half, 2 tiles, filter 2
        },
        {{305, 68, 39, 148, 25, 77, 19, 41, 151, 54, 103, 304, 120},  // half, 3 tiles, filter 0
         {313, 68, 39, 148, 25, 77, 19, 41, 118, 20, 103, 304, 120},  // half, 3 tiles, filter 1
         {312, 68, 39, 148, 25, 77, 19, 41, 119, 23, 103, 304, 120},  // half, 3 tiles, filter 2
        },
        {{310, 68, 40, 149, 25, 77, 19, 41, 156, 54, 103, 230, 100},  // half, 4 tiles, filter 0
         {319, 68, 40, 148, 25, 77, 19, 41, 118, 20, 103, 230, 100},  // half, 4 tiles, filter 1
         {318, 68, 40, 148, 25, 77, 19, 41, 119, 23, 103, 230, 100},  // half, 4 tiles, filter 2
        },
        {{309, 67, 39, 148, 25, 56, 13, 25, 139, 38, 103, 212, 96},  // half, 8 tiles, filter 0
         {318, 67, 40, 149, 25, 56, 13, 25, 167, 12, 104, 212, 96},  // half, 8 tiles, filter 1
         {316, 67, 39, 148, 25, 56, 13, 25, 167, 12, 104, 213, 96},  // half, 8 tiles, filter 2
        },
        {{333, 68, 40, 148, 25, 57, 13, 25, 151, 38, 103, 281, 144},  // half, 12 tiles, filter 0
         {348, 68, 41, 149, 25, 57, 13, 25, 187, 12, 104, 283, 144},  // half, 12 tiles, filter 1
         {350, 68, 41, 149, 25, 57, 13, 25, 192, 12, 104, 287, 144},  // half, 12 tiles, filter 2
        },
        {{349, 68, 40, 147, 25, 62, 13, 25, 203, 39, 105, 407, 270},  // half, 20 tiles, filter 0
         {348, 67, 47, 147, 25, 58, 13, 25, 229, 12, 104, 424, 240},  // half, 20 tiles, filter 1
         {349, 67, 47, 147, 25, 58, 13, 25, 230, 12, 105, 424, 240},  // half, 20 tiles, filter 2
        },
    },
    {
        {{301, 68, 39, 148, 25, 77, 19, 41, 209, 106, 103, 219, 68},  // bfloat16, 2 tiles, filter 0
         {310, 68, 39, 148, 25, 77, 19, 41, 118, 54, 103, 219, 68},  // bfloat16, 2 tiles, filter 1
         {308, 68, 39, 148, 25, 77, 19, 41, 119, 73, 103, 214, 68},  // bfloat16, 2 tiles, filter 2
        },
        {{305, 68, 39, 148, 25, 77, 19, 41, 214, 106, 103, 305, 120},  // bfloat16, 3 tiles, filter 0
         {313, 68, 40, 148, 25, 77, 19, 41, 118, 54, 103, 306, 120},  // bfloat16, 3 tiles, filter 1
         {312, 68, 39, 148, 25, 77, 19, 41, 119, 73, 103, 305, 120},  // bfloat16, 3 tiles, filter 2
        },
        {{310, 68, 39, 148, 25, 77, 19, 41, 219, 106, 103, 231, 100},  // bfloat16, 4 tiles, filter 0
         {317, 68, 39, 148, 25, 77, 19, 41, 118, 54, 103, 232, 100},  // bfloat16, 4 tiles, filter 1
         {316, 68, 39, 148, 25, 77, 19, 41, 119, 73, 103, 232, 100},  // bfloat16, 4 tiles, filter 2
        },
        {{308, 67, 39, 148, 25, 56, 13, 25, 172, 74, 103, 212, 96},  // bfloat16, 8 tiles, filter 0
         {316, 67, 39, 148, 25, 56, 13, 25, 200, 38, 104, 211, 96},  // bfloat16, 8 tiles, filter 1
         {316, 67, 39, 148, 25, 56, 13, 25, 200, 41, 104, 211, 96},  // bfloat16, 8 tiles, filter 2
        },
        {{315, 67, 40, 148, 25, 57, 13, 25, 181, 74, 103, 275, 144},  // bfloat16, 12 tiles, filter 0
         {324, 67, 40, 148, 25, 57, 13, 25, 212, 38, 103, 275, 144},  // bfloat16, 12 tiles, filter 1
         {324, 67, 40, 148, 25, 57, 13, 25, 212, 41, 103, 275, 144},  // bfloat16, 12 tiles, filter 2
        },
        {{333, 67, 40, 149, 25, 57, 13, 25, 205, 74, 103, 402, 270},  // bfloat16, 20 tiles, filter 0
         {341, 67, 40, 149, 25, 57, 13, 25, 236, 38, 103, 412, 240},  // bfloat16, 20 tiles, filter 1
         {341, 67, 40, 149, 25, 57, 13, 25, 236, 41, 103, 412, 240},  // bfloat16, 20 tiles, filter 2
        },
    },
    {
        {{298, 62, 39, 148, 23, 95, 100, 96, 218, 60, 107, 142, 24},  // tf32, 2 tiles, filter 0
         {296, 62, 39, 148, 23, 95, 100, 96, 218, 28, 107, 142, 24},  // tf32, 2 tiles, filter 1
         {296, 62, 39, 148, 23, 95, 100, 96, 218, 29, 107, 142, 24},  // tf32, 2 tiles, filter 2
        },
        {{293, 62, 39, 148, 23, 96, 105, 99, 243, 60, 103, 188, 44},  // tf32, 3 tiles, filter 0
         {297, 62, 39, 148, 23, 95, 100, 96, 243, 28, 103, 187, 44},  // tf32, 3 tiles, filter 1
         {297, 62, 39, 148, 23, 95, 100, 96, 243, 29, 103, 187, 44},  // tf32, 3 tiles, filter 2
        },
        {{295, 62, 39, 148, 23, 96, 100, 99, 267, 60, 103, 168, 17},  // tf32, 4 tiles, filter 0
         {295, 62, 39, 148, 23, 96, 100, 99, 267, 28, 103, 168, 17},  // tf32, 4 tiles, filter 1
         {295, 62, 39, 148, 23, 96, 100, 99, 267, 29, 103, 168, 17},  // tf32, 4 tiles, filter 2
        },
        {{283, 62, 40, 148, 23, 96, 104, 99, 363, 60, 103, 221, 35},  // tf32, 8 tiles, filter 0
         {307, 62, 39, 148, 23, 95, 104, 96, 363, 28, 103, 221, 35},  // tf32, 8 tiles, filter 1
         {307, 62, 39, 148, 23, 95, 104, 96, 363, 29, 103, 221, 35},  // tf32, 8 tiles, filter 2
        },
        {{288, 62, 39, 148, 23, 100, 101, 101, 454, 59, 103, 272, 53},  // tf32, 12 tiles, filter 0
         {287, 62, 40, 148, 23, 100, 101, 101, 454, 28, 103, 273, 53},  // tf32, 12 tiles, filter 1
         {287, 62, 40, 148, 23, 100, 101, 101, 454, 29, 103, 273, 53},  // tf32, 12 tiles, filter 2
        },
        {{330, 62, 40, 148, 23, 100, 104, 102, 646, 60, 103, 334, 104},  // tf32, 20 tiles, filter 0
         {325, 62, 39, 147, 23, 96, 104, 101, 651, 28, 103, 329, 104},  // tf32, 20 tiles, filter 1
         {325, 62, 39, 147, 23, 96, 104, 101, 651, 29, 103, 329, 104},  // tf32, 20 tiles, filter 2
        },
    },
    {
        {{289, 62, 40, 147, 23, 105, 423, 442, 627, 60, 107, 131, 24},  // float, 2 tiles, filter 0
         {290, 62, 39, 147, 23, 106, 422, 441, 627, 28, 107, 130, 24},  // float, 2 tiles, filter 1
         {292, 62, 39, 147, 23, 105, 423, 442, 627, 29, 107, 130, 24},  // float, 2 tiles, filter 2
        },
        {{295, 62, 40, 147, 23, 101, 422, 441, 788, 60, 107, 186, 44},  // float, 3 tiles, filter 0
         {296, 62, 39, 147, 23, 101, 422, 441, 788, 28, 107, 186, 44},  // float, 3 tiles, filter 1
         {296, 62, 39, 147, 23, 101, 422, 441, 788, 29, 107, 186, 44},  // float, 3 tiles, filter 2
        },
        {{294, 62, 40, 150, 23, 101, 422, 441, 945, 60, 103, 170, 17},  // float, 4 tiles, filter 0
         {297, 62, 40, 147, 23, 101, 425, 444, 942, 28, 107, 158, 17},  // float, 4 tiles, filter 1
         {297, 62, 40, 147, 23, 101, 425, 444, 942, 29, 107, 158, 17},  // float, 4 tiles, filter 2
        },
        {{278, 62, 40, 150, 23, 103, 434, 458, 1567, 60, 103, 223, 35},  // float, 8 tiles, filter 0
         {278, 62, 40, 150, 23, 103, 434, 458, 1567, 28, 103, 223, 35},  // float, 8 tiles, filter 1
         {278, 62, 40, 150, 23, 103, 434, 458, 1567, 29, 103, 223, 35},  // float, 8 tiles, filter 2
        },
        {{285, 62, 40, 150, 23, 102, 422, 444, 2194, 60, 103, 273, 53},  // float, 12 tiles, filter 0
         {285, 62, 40, 150, 23, 102, 422, 444, 2194, 28, 103, 273, 53},  // float, 12 tiles, filter 1
         {285, 62, 40, 150, 23, 102, 422, 444, 2194, 29, 103, 273, 53},  // float, 12 tiles, filter 2
        },
        {{324, 62, 39, 147, 23, 103, 424, 449, 3414, 60, 103, 325, 89},  // float, 20 tiles, filter 0
         {324, 62, 39, 147, 23, 103, 424, 449, 3426, 28, 103, 325, 89},  // float, 20 tiles, filter 1
         {324, 62, 39, 147, 23, 103, 424, 449, 3426, 29, 103, 325, 89},  // float, 20 tiles, filter 2
        },
    },
    // counts: end
};
// clang-format on

}  // namespace cuda
}  // namespace mnv2
