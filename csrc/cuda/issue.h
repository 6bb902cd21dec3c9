// What a warp of the block kernel issues, for plans and predictions. bench/cuda_issue.py counts it in the machine code
// and writes the table; run it after every change of the kernel.
#pragma once

namespace mnv2 {
namespace cuda {

// Instructions of a warp on sm_90a.
struct Issue {
  double start;      // once
  double place;      // for 32 pixels of the table of places
  double round;      // every round, before its first chunk
  double pixel;      // to copy 32 vectors of 16 bytes of the input
  double find;       // to find where 32 times four values of a stem's tile come from
  double values;     // and to copy them, for every row
  double row_block;  // of the expansion's pixels that are multiplied together
  double step;       // and for every step of their sum
  double window;     // if these are a stem's windows
  double chunk;      // every chunk besides the expansion: barriers, filter, projection
  double tap;        // of filter 0, which may have any number of them, for a lane's patch
  double copy;       // every chunk, of one warp alone: to fetch weights
  double store;      // every round, of sums and biases
  double residual;   // every round, if there is one
};

// By arithmetic (fp16, bf16, tf32, exact fp32), kColumnTiles and filter (as in filter.cuh).
// clang-format off
constexpr Issue kIssue[4][6][3] = {
    // counts: begin, nvcc 13.0
    {
        {{207, 67, 95, 19, 62, 22, 99, 19, 41, 150, 31, 44, 162, 105},  // half, 2 tiles, filter 0
         {272, 66, 72, 21, 62, 22, 80, 19, 41, 363, 0, 45, 112, 91},  // half, 2 tiles, filter 1
         {231, 66, 115, 19, 62, 22, 128, 19, 41, 374, 0, 45, 183, 105},  // half, 2 tiles, filter 2
        },
        {{263, 67, 65, 19, 62, 22, 73, 19, 41, 162, 31, 44, 146, 161},  // half, 3 tiles, filter 0
         {266, 67, 73, 19, 62, 22, 71, 19, 41, 349, 0, 45, 158, 161},  // half, 3 tiles, filter 1
         {267, 67, 73, 19, 62, 22, 71, 19, 41, 355, 0, 45, 158, 161},  // half, 3 tiles, filter 2
        },
        {{216, 67, 77, 19, 62, 22, 72, 19, 41, 161, 31, 43, 142, 176},  // half, 4 tiles, filter 0
         {217, 67, 88, 19, 62, 22, 73, 19, 41, 353, 0, 45, 146, 176},  // half, 4 tiles, filter 1
         {218, 67, 84, 19, 62, 22, 72, 19, 41, 363, 0, 45, 146, 176},  // half, 4 tiles, filter 2
        },
        {{221, 66, 80, 19, 62, 22, 43, 14, 26, 136, 18, 44, 138, 158},  // half, 8 tiles, filter 0
         {233, 66, 81, 19, 62, 22, 41, 14, 26, 258, 0, 45, 138, 158},  // half, 8 tiles, filter 1
         {233, 66, 81, 19, 62, 22, 41, 14, 26, 261, 0, 45, 138, 158},  // half, 8 tiles, filter 2
        },
        {{163, 66, 68, 19, 62, 22, 59, 14, 26, 179, 18, 33, 236, 232},  // half, 12 tiles, filter 0
         {163, 67, 64, 19, 62, 22, 60, 14, 26, 270, 0, 33, 235, 232},  // half, 12 tiles, filter 1
         {163, 67, 64, 19, 62, 22, 60, 14, 26, 273, 0, 33, 235, 232},  // half, 12 tiles, filter 2
        },
        {{221, 70, 104, 19, 62, 22, 43, 14, 26, 171, 18, 44, 221, 370},  // half, 20 tiles, filter 0
         {249, 65, 104, 19, 62, 22, 41, 14, 26, 292, 0, 45, 226, 370},  // half, 20 tiles, filter 1
         {249, 65, 104, 19, 62, 22, 41, 14, 26, 295, 0, 45, 226, 370},  // half, 20 tiles, filter 2
        },
    },
    {
        {{216, 67, 70, 19, 62, 22, 72, 19, 41, 186, 86, 44, 148, 105},  // bfloat16, 2 tiles, filter 0
         {226, 67, 65, 19, 62, 22, 71, 19, 41, 689, 0, 44, 148, 105},  // bfloat16, 2 tiles, filter 1
         {226, 67, 65, 19, 62, 22, 71, 19, 41, 816, 0, 44, 148, 105},  // bfloat16, 2 tiles, filter 2
        },
        {{217, 67, 74, 19, 62, 22, 72, 19, 41, 192, 86, 44, 190, 198},  // bfloat16, 3 tiles, filter 0
         {229, 67, 69, 19, 62, 22, 71, 19, 41, 695, 0, 44, 190, 200},  // bfloat16, 3 tiles, filter 1
         {229, 67, 69, 19, 62, 22, 71, 19, 41, 822, 0, 44, 190, 200},  // bfloat16, 3 tiles, filter 2
        },
        {{215, 67, 77, 19, 62, 22, 72, 19, 41, 196, 86, 43, 142, 176},  // bfloat16, 4 tiles, filter 0
         {222, 67, 73, 19, 62, 22, 71, 19, 41, 704, 0, 44, 142, 178},  // bfloat16, 4 tiles, filter 1
         {222, 67, 73, 19, 62, 22, 71, 19, 41, 831, 0, 44, 142, 178},  // bfloat16, 4 tiles, filter 2
        },
        {{221, 66, 80, 19, 62, 22, 43, 14, 26, 156, 49, 44, 138, 158},  // bfloat16, 8 tiles, filter 0
         {233, 66, 81, 19, 62, 22, 41, 14, 26, 506, 0, 45, 138, 158},  // bfloat16, 8 tiles, filter 1
         {233, 66, 81, 19, 62, 22, 41, 14, 26, 533, 0, 45, 138, 158},  // bfloat16, 8 tiles, filter 2
        },
        {{162, 66, 68, 19, 62, 22, 59, 14, 26, 198, 49, 33, 235, 232},  // bfloat16, 12 tiles, filter 0
         {160, 70, 68, 19, 62, 22, 60, 14, 26, 516, 0, 33, 236, 232},  // bfloat16, 12 tiles, filter 1
         {160, 70, 68, 19, 62, 22, 60, 14, 26, 543, 0, 33, 236, 232},  // bfloat16, 12 tiles, filter 2
        },
        {{221, 70, 104, 19, 62, 22, 43, 14, 26, 195, 49, 44, 221, 370},  // bfloat16, 20 tiles, filter 0
         {249, 65, 104, 19, 62, 22, 41, 14, 26, 543, 0, 45, 226, 370},  // bfloat16, 20 tiles, filter 1
         {249, 65, 104, 19, 62, 22, 41, 14, 26, 570, 0, 45, 226, 370},  // bfloat16, 20 tiles, filter 2
        },
    },
    {
        {{213, 61, 89, 19, 63, 21, 100, 101, 97, 230, 38, 44, 131, 36},  // tf32, 2 tiles, filter 0
         {223, 68, 60, 19, 63, 21, 107, 104, 97, 461, 0, 45, 123, 36},  // tf32, 2 tiles, filter 1
         {223, 68, 58, 19, 63, 21, 105, 105, 97, 480, 0, 45, 127, 36},  // tf32, 2 tiles, filter 2
        },
        {{219, 61, 67, 19, 63, 21, 98, 100, 97, 242, 38, 43, 135, 79},  // tf32, 3 tiles, filter 0
         {236, 68, 45, 19, 63, 21, 97, 101, 97, 472, 0, 44, 126, 79},  // tf32, 3 tiles, filter 1
         {236, 68, 45, 19, 63, 21, 97, 101, 97, 478, 0, 44, 126, 79},  // tf32, 3 tiles, filter 2
        },
        {{219, 61, 70, 19, 63, 21, 101, 104, 97, 269, 38, 44, 128, 15},  // tf32, 4 tiles, filter 0
         {228, 68, 47, 19, 63, 21, 99, 101, 97, 504, 0, 44, 121, 15},  // tf32, 4 tiles, filter 1
         {229, 68, 47, 19, 63, 21, 99, 101, 97, 510, 0, 44, 121, 15},  // tf32, 4 tiles, filter 2
        },
        {{237, 61, 57, 19, 62, 21, 90, 104, 95, 348, 38, 44, 127, 47},  // tf32, 8 tiles, filter 0
         {218, 68, 79, 19, 62, 21, 91, 100, 95, 602, 0, 44, 136, 47},  // tf32, 8 tiles, filter 1
         {218, 68, 79, 19, 62, 21, 91, 100, 95, 608, 0, 44, 136, 47},  // tf32, 8 tiles, filter 2
        },
        {{225, 61, 87, 19, 62, 21, 90, 109, 98, 457, 38, 44, 157, 71},  // tf32, 12 tiles, filter 0
         {220, 68, 87, 19, 62, 21, 93, 109, 96, 698, 0, 44, 157, 71},  // tf32, 12 tiles, filter 1
         {220, 68, 87, 19, 62, 21, 93, 109, 96, 704, 0, 44, 157, 71},  // tf32, 12 tiles, filter 2
        },
        {{220, 68, 103, 19, 62, 21, 92, 101, 95, 649, 38, 44, 194, 117},  // tf32, 20 tiles, filter 0
         {224, 68, 103, 19, 62, 21, 91, 101, 95, 890, 0, 44, 194, 117},  // tf32, 20 tiles, filter 1
         {224, 68, 103, 19, 62, 21, 91, 101, 95, 896, 0, 44, 194, 117},  // tf32, 20 tiles, filter 2
        },
    },
    {
        {{226, 61, 61, 19, 62, 21, 98, 423, 443, 631, 38, 44, 123, 36},  // float, 2 tiles, filter 0
         {267, 68, 42, 19, 62, 21, 99, 426, 446, 859, 0, 44, 114, 36},  // float, 2 tiles, filter 1
         {267, 68, 42, 19, 62, 21, 99, 426, 446, 865, 0, 44, 114, 36},  // float, 2 tiles, filter 2
        },
        {{226, 61, 53, 19, 62, 21, 92, 423, 443, 786, 38, 45, 136, 79},  // float, 3 tiles, filter 0
         {269, 68, 44, 19, 62, 21, 93, 431, 451, 1017, 0, 45, 127, 79},  // float, 3 tiles, filter 1
         {269, 68, 44, 19, 62, 21, 93, 431, 451, 1023, 0, 45, 127, 79},  // float, 3 tiles, filter 2
        },
        {{219, 61, 69, 19, 62, 21, 92, 423, 443, 954, 38, 45, 129, 15},  // float, 4 tiles, filter 0
         {264, 68, 47, 19, 62, 21, 93, 431, 451, 1184, 0, 45, 120, 15},  // float, 4 tiles, filter 1
         {264, 68, 47, 19, 62, 21, 94, 431, 451, 1190, 0, 45, 120, 15},  // float, 4 tiles, filter 2
        },
        {{220, 61, 79, 19, 62, 21, 94, 433, 453, 1579, 38, 45, 136, 47},  // float, 8 tiles, filter 0
         {236, 68, 55, 19, 62, 21, 94, 423, 442, 1798, 0, 45, 127, 47},  // float, 8 tiles, filter 1
         {236, 68, 55, 19, 62, 21, 94, 423, 442, 1804, 0, 45, 127, 47},  // float, 8 tiles, filter 2
        },
        {{223, 61, 87, 19, 62, 21, 95, 423, 442, 2190, 38, 46, 159, 71},  // float, 12 tiles, filter 0
         {226, 68, 87, 19, 62, 21, 93, 423, 443, 2441, 0, 46, 159, 71},  // float, 12 tiles, filter 1
         {226, 68, 87, 19, 62, 21, 93, 423, 443, 2447, 0, 46, 159, 71},  // float, 12 tiles, filter 2
        },
        {{220, 68, 101, 19, 62, 21, 94, 423, 443, 3431, 38, 45, 192, 117},  // float, 20 tiles, filter 0
         {220, 68, 101, 19, 62, 21, 96, 423, 443, 3678, 0, 45, 192, 117},  // float, 20 tiles, filter 1
         {220, 68, 101, 19, 62, 21, 95, 423, 443, 3684, 0, 45, 192, 117},  // float, 20 tiles, filter 2
        },
    },
    // counts: end
};
// clang-format on

}  // namespace cuda
}  // namespace mnv2
