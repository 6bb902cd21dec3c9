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
        {{289, 68, 39, 149, 25, 78, 19, 41, 147, 54, 103, 270, 68},  // half, 2 tiles, filter 0
         {297, 68, 39, 149, 25, 77, 19, 41, 123, 20, 103, 270, 68},  // half, 2 tiles, filter 1
         {296, 68, 39, 149, 25, 77, 19, 41, 125, 23, 104, 270, 68},  // half, 2 tiles, filter 2
        },
        {{293, 68, 39, 149, 25, 78, 19, 41, 152, 54, 103, 361, 120},  // half, 3 tiles, filter 0
         {301, 68, 40, 149, 25, 77, 19, 41, 123, 20, 103, 361, 120},  // half, 3 tiles, filter 1
         {300, 68, 39, 149, 25, 77, 19, 41, 124, 23, 103, 361, 120},  // half, 3 tiles, filter 2
        },
        {{302, 68, 40, 148, 24, 78, 19, 41, 157, 55, 103, 283, 100},  // half, 4 tiles, filter 0
         {310, 68, 39, 148, 25, 77, 19, 41, 123, 20, 103, 283, 100},  // half, 4 tiles, filter 1
         {310, 68, 39, 148, 25, 77, 19, 41, 124, 23, 103, 282, 100},  // half, 4 tiles, filter 2
        },
        {{299, 67, 39, 149, 25, 44, 14, 26, 139, 38, 103, 264, 96},  // half, 8 tiles, filter 0
         {306, 67, 39, 151, 25, 44, 14, 26, 167, 12, 104, 264, 96},  // half, 8 tiles, filter 1
         {306, 67, 39, 151, 25, 44, 14, 26, 167, 12, 104, 264, 96},  // half, 8 tiles, filter 2
        },
        {{238, 67, 39, 149, 24, 46, 14, 26, 211, 39, 103, 387, 144},  // half, 12 tiles, filter 0
         {238, 67, 39, 149, 24, 46, 14, 26, 217, 12, 103, 388, 144},  // half, 12 tiles, filter 1
         {238, 67, 39, 149, 24, 46, 14, 26, 217, 13, 103, 388, 144},  // half, 12 tiles, filter 2
        },
        {{332, 67, 40, 149, 25, 44, 14, 26, 175, 38, 103, 452, 270},  // half, 20 tiles, filter 0
         {338, 67, 40, 149, 25, 44, 14, 26, 205, 12, 103, 456, 240},  // half, 20 tiles, filter 1
         {338, 67, 40, 149, 25, 44, 14, 26, 205, 12, 103, 456, 240},  // half, 20 tiles, filter 2
        },
    },
    {
        {{290, 68, 40, 148, 25, 78, 19, 41, 210, 106, 103, 267, 68},  // bfloat16, 2 tiles, filter 0
         {297, 68, 40, 148, 25, 77, 19, 41, 123, 54, 103, 268, 68},  // bfloat16, 2 tiles, filter 1
         {297, 68, 40, 148, 25, 77, 19, 41, 125, 73, 104, 267, 68},  // bfloat16, 2 tiles, filter 2
        },
        {{293, 68, 40, 148, 25, 78, 19, 41, 215, 106, 103, 358, 120},  // bfloat16, 3 tiles, filter 0
         {306, 68, 40, 148, 25, 77, 19, 41, 123, 54, 103, 356, 120},  // bfloat16, 3 tiles, filter 1
         {305, 68, 39, 148, 25, 77, 19, 41, 124, 73, 103, 356, 120},  // bfloat16, 3 tiles, filter 2
        },
        {{302, 68, 39, 148, 25, 78, 19, 41, 220, 106, 103, 283, 100},  // bfloat16, 4 tiles, filter 0
         {310, 68, 39, 148, 25, 77, 19, 41, 123, 54, 103, 283, 100},  // bfloat16, 4 tiles, filter 1
         {309, 68, 40, 148, 25, 77, 19, 41, 124, 73, 103, 283, 100},  // bfloat16, 4 tiles, filter 2
        },
        {{299, 67, 40, 148, 25, 44, 14, 26, 172, 74, 103, 263, 96},  // bfloat16, 8 tiles, filter 0
         {306, 67, 40, 150, 25, 44, 14, 26, 200, 38, 104, 263, 96},  // bfloat16, 8 tiles, filter 1
         {306, 67, 40, 150, 25, 44, 14, 26, 200, 41, 104, 263, 96},  // bfloat16, 8 tiles, filter 2
        },
        {{238, 67, 40, 148, 24, 46, 14, 26, 244, 74, 103, 385, 144},  // bfloat16, 12 tiles, filter 0
         {238, 67, 40, 148, 24, 46, 14, 26, 249, 38, 103, 385, 144},  // bfloat16, 12 tiles, filter 1
         {238, 67, 40, 148, 24, 46, 14, 26, 250, 41, 103, 385, 144},  // bfloat16, 12 tiles, filter 2
        },
        {{332, 67, 40, 149, 25, 44, 14, 26, 206, 74, 103, 452, 270},  // bfloat16, 20 tiles, filter 0
         {338, 67, 40, 149, 25, 44, 14, 26, 238, 38, 103, 456, 240},  // bfloat16, 20 tiles, filter 1
         {338, 67, 40, 149, 25, 44, 14, 26, 238, 41, 103, 456, 240},  // bfloat16, 20 tiles, filter 2
        },
    },
    {
        {{287, 62, 40, 148, 23, 96, 104, 96, 219, 60, 107, 189, 24},  // tf32, 2 tiles, filter 0
         {285, 62, 40, 148, 23, 96, 104, 96, 219, 28, 107, 189, 24},  // tf32, 2 tiles, filter 1
         {285, 62, 40, 148, 23, 96, 104, 96, 219, 29, 107, 189, 24},  // tf32, 2 tiles, filter 2
        },
        {{288, 62, 40, 148, 23, 96, 104, 96, 243, 60, 107, 237, 44},  // tf32, 3 tiles, filter 0
         {288, 62, 40, 148, 23, 96, 104, 96, 243, 28, 107, 237, 44},  // tf32, 3 tiles, filter 1
         {288, 62, 40, 148, 23, 96, 104, 96, 243, 29, 107, 237, 44},  // tf32, 3 tiles, filter 2
        },
        {{264, 62, 40, 148, 23, 97, 104, 99, 268, 60, 103, 218, 17},  // tf32, 4 tiles, filter 0
         {264, 62, 40, 148, 23, 97, 104, 96, 268, 28, 103, 218, 17},  // tf32, 4 tiles, filter 1
         {264, 62, 40, 148, 23, 97, 104, 96, 268, 29, 103, 218, 17},  // tf32, 4 tiles, filter 2
        },
        {{274, 62, 40, 148, 23, 97, 104, 99, 364, 60, 103, 273, 35},  // tf32, 8 tiles, filter 0
         {296, 62, 39, 147, 23, 96, 104, 96, 364, 28, 103, 273, 35},  // tf32, 8 tiles, filter 1
         {296, 62, 39, 147, 23, 96, 104, 96, 364, 29, 103, 273, 35},  // tf32, 8 tiles, filter 2
        },
        {{305, 62, 40, 148, 23, 101, 104, 101, 455, 60, 103, 323, 53},  // tf32, 12 tiles, filter 0
         {306, 62, 40, 148, 23, 101, 104, 101, 455, 28, 103, 322, 53},  // tf32, 12 tiles, filter 1
         {306, 62, 40, 148, 23, 101, 104, 101, 455, 29, 103, 322, 53},  // tf32, 12 tiles, filter 2
        },
        {{323, 62, 40, 148, 23, 101, 100, 102, 647, 60, 103, 382, 104},  // tf32, 20 tiles, filter 0
         {316, 62, 40, 147, 23, 101, 100, 101, 647, 28, 103, 384, 104},  // tf32, 20 tiles, filter 1
         {316, 62, 40, 147, 23, 101, 100, 101, 647, 29, 103, 384, 104},  // tf32, 20 tiles, filter 2
        },
    },
    {
        {{283, 62, 40, 147, 23, 102, 422, 441, 627, 60, 107, 188, 24},  // float, 2 tiles, filter 0
         {286, 62, 39, 147, 23, 102, 422, 441, 629, 28, 107, 188, 24},  // float, 2 tiles, filter 1
         {286, 62, 39, 147, 23, 102, 422, 441, 629, 29, 107, 188, 24},  // float, 2 tiles, filter 2
        },
        {{289, 62, 40, 147, 23, 98, 423, 442, 788, 60, 107, 236, 44},  // float, 3 tiles, filter 0
         {290, 62, 39, 147, 23, 98, 423, 442, 788, 28, 107, 236, 44},  // float, 3 tiles, filter 1
         {290, 62, 39, 147, 23, 98, 423, 442, 788, 29, 107, 236, 44},  // float, 3 tiles, filter 2
        },
        {{286, 62, 40, 150, 23, 102, 423, 442, 946, 60, 107, 219, 17},  // float, 4 tiles, filter 0
         {291, 62, 40, 147, 23, 102, 422, 441, 943, 28, 107, 217, 17},  // float, 4 tiles, filter 1
         {291, 62, 40, 147, 23, 102, 422, 441, 943, 29, 107, 217, 17},  // float, 4 tiles, filter 2
        },
        {{267, 62, 40, 150, 23, 103, 429, 451, 1570, 60, 103, 276, 35},  // float, 8 tiles, filter 0
         {267, 62, 40, 150, 23, 99, 429, 451, 1570, 28, 103, 276, 35},  // float, 8 tiles, filter 1
         {267, 62, 40, 150, 23, 99, 429, 451, 1570, 29, 103, 276, 35},  // float, 8 tiles, filter 2
        },
        {{298, 62, 40, 150, 23, 103, 422, 444, 2195, 60, 103, 323, 53},  // float, 12 tiles, filter 0
         {298, 62, 40, 150, 23, 99, 422, 444, 2195, 28, 103, 323, 53},  // float, 12 tiles, filter 1
         {298, 62, 40, 150, 23, 99, 422, 444, 2195, 29, 103, 323, 53},  // float, 12 tiles, filter 2
        },
        {{318, 62, 39, 147, 23, 100, 420, 445, 3420, 60, 103, 376, 89},  // float, 20 tiles, filter 0
         {318, 62, 39, 147, 23, 100, 420, 445, 3412, 28, 103, 376, 89},  // float, 20 tiles, filter 1
         {318, 62, 39, 147, 23, 100, 420, 445, 3412, 29, 103, 376, 89},  // float, 20 tiles, filter 2
        },
    },
    // counts: end
};
// clang-format on

}  // namespace cuda
}  // namespace mnv2
