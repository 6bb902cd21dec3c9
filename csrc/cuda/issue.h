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
        {{205, 67, 95, 19, 62, 22, 99, 19, 41, 151, 31, 43, 162, 105},  // half, 2 tiles, filter 0
         {271, 66, 72, 21, 62, 22, 88, 19, 41, 353, 0, 44, 112, 91},  // half, 2 tiles, filter 1
         {230, 66, 112, 19, 62, 23, 128, 19, 41, 381, 0, 44, 183, 105},  // half, 2 tiles, filter 2
        },
        {{261, 67, 65, 19, 62, 22, 75, 19, 41, 164, 31, 43, 146, 161},  // half, 3 tiles, filter 0
         {269, 67, 73, 19, 62, 22, 78, 19, 41, 337, 0, 44, 158, 161},  // half, 3 tiles, filter 1
         {273, 67, 63, 19, 62, 22, 78, 19, 41, 348, 0, 44, 155, 161},  // half, 3 tiles, filter 2
        },
        {{214, 67, 77, 19, 62, 22, 74, 19, 41, 163, 31, 43, 142, 176},  // half, 4 tiles, filter 0
         {217, 67, 90, 19, 62, 22, 74, 19, 41, 355, 0, 44, 146, 178},  // half, 4 tiles, filter 1
         {218, 67, 84, 19, 62, 22, 72, 19, 41, 366, 0, 44, 146, 176},  // half, 4 tiles, filter 2
        },
        {{219, 66, 80, 19, 62, 22, 45, 14, 26, 137, 18, 43, 138, 158},  // half, 8 tiles, filter 0
         {233, 66, 81, 19, 62, 22, 41, 14, 26, 258, 0, 43, 138, 158},  // half, 8 tiles, filter 1
         {233, 66, 81, 19, 62, 22, 41, 14, 26, 261, 0, 43, 138, 158},  // half, 8 tiles, filter 2
        },
        {{162, 66, 68, 19, 62, 22, 60, 14, 26, 184, 18, 44, 236, 232},  // half, 12 tiles, filter 0
         {162, 67, 64, 19, 62, 22, 61, 14, 26, 271, 0, 44, 235, 232},  // half, 12 tiles, filter 1
         {162, 67, 64, 19, 62, 22, 61, 14, 26, 274, 0, 44, 235, 232},  // half, 12 tiles, filter 2
        },
        {{219, 70, 104, 19, 62, 22, 45, 14, 26, 172, 18, 43, 221, 370},  // half, 20 tiles, filter 0
         {249, 65, 104, 19, 62, 22, 46, 14, 26, 288, 0, 44, 226, 370},  // half, 20 tiles, filter 1
         {249, 65, 104, 19, 62, 22, 46, 14, 26, 291, 0, 44, 226, 370},  // half, 20 tiles, filter 2
        },
    },
    {
        {{214, 67, 70, 19, 62, 22, 74, 19, 41, 188, 86, 43, 148, 105},  // bfloat16, 2 tiles, filter 0
         {225, 67, 65, 19, 62, 22, 71, 19, 41, 690, 0, 43, 148, 107},  // bfloat16, 2 tiles, filter 1
         {225, 67, 65, 19, 62, 22, 71, 19, 41, 817, 0, 43, 148, 107},  // bfloat16, 2 tiles, filter 2
        },
        {{215, 67, 74, 19, 62, 22, 74, 19, 41, 194, 86, 43, 190, 198},  // bfloat16, 3 tiles, filter 0
         {229, 67, 69, 19, 62, 22, 71, 19, 41, 695, 0, 43, 190, 200},  // bfloat16, 3 tiles, filter 1
         {229, 67, 69, 19, 62, 22, 71, 19, 41, 822, 0, 43, 190, 200},  // bfloat16, 3 tiles, filter 2
        },
        {{213, 67, 77, 19, 62, 22, 74, 19, 41, 198, 86, 43, 142, 176},  // bfloat16, 4 tiles, filter 0
         {223, 67, 73, 19, 62, 22, 71, 19, 41, 707, 0, 43, 142, 178},  // bfloat16, 4 tiles, filter 1
         {223, 67, 73, 19, 62, 22, 71, 19, 41, 834, 0, 43, 142, 178},  // bfloat16, 4 tiles, filter 2
        },
        {{219, 66, 80, 19, 62, 22, 45, 14, 26, 157, 49, 43, 138, 158},  // bfloat16, 8 tiles, filter 0
         {233, 66, 81, 19, 62, 22, 41, 14, 26, 506, 0, 43, 138, 158},  // bfloat16, 8 tiles, filter 1
         {233, 66, 81, 19, 62, 22, 41, 14, 26, 533, 0, 43, 138, 158},  // bfloat16, 8 tiles, filter 2
        },
        {{161, 66, 68, 19, 62, 22, 60, 14, 26, 203, 49, 44, 235, 232},  // bfloat16, 12 tiles, filter 0
         {159, 70, 68, 19, 62, 22, 61, 14, 26, 523, 0, 42, 236, 232},  // bfloat16, 12 tiles, filter 1
         {159, 70, 68, 19, 62, 22, 61, 14, 26, 550, 0, 42, 236, 232},  // bfloat16, 12 tiles, filter 2
        },
        {{219, 70, 104, 19, 62, 22, 45, 14, 26, 196, 49, 43, 221, 370},  // bfloat16, 20 tiles, filter 0
         {249, 65, 104, 19, 62, 22, 41, 14, 26, 543, 0, 44, 226, 370},  // bfloat16, 20 tiles, filter 1
         {249, 65, 104, 19, 62, 22, 41, 14, 26, 570, 0, 44, 226, 370},  // bfloat16, 20 tiles, filter 2
        },
    },
    {
        {{211, 61, 91, 19, 63, 21, 100, 101, 97, 229, 38, 44, 131, 36},  // tf32, 2 tiles, filter 0
         {218, 61, 71, 19, 63, 21, 103, 104, 97, 468, 0, 44, 131, 36},  // tf32, 2 tiles, filter 1
         {214, 61, 67, 19, 63, 21, 103, 109, 98, 481, 0, 43, 136, 36},  // tf32, 2 tiles, filter 2
        },
        {{217, 61, 67, 19, 63, 21, 100, 100, 97, 242, 38, 43, 135, 79},  // tf32, 3 tiles, filter 0
         {232, 68, 53, 19, 63, 21, 101, 101, 97, 471, 0, 43, 146, 79},  // tf32, 3 tiles, filter 1
         {232, 68, 53, 19, 63, 21, 101, 101, 97, 478, 0, 43, 146, 79},  // tf32, 3 tiles, filter 2
        },
        {{219, 61, 70, 19, 63, 21, 103, 104, 97, 270, 38, 43, 128, 15},  // tf32, 4 tiles, filter 0
         {222, 68, 55, 19, 63, 21, 105, 104, 97, 504, 0, 43, 128, 15},  // tf32, 4 tiles, filter 1
         {222, 68, 55, 19, 63, 21, 105, 104, 97, 510, 0, 43, 128, 15},  // tf32, 4 tiles, filter 2
        },
        {{237, 61, 57, 19, 62, 21, 90, 104, 95, 354, 38, 43, 127, 47},  // tf32, 8 tiles, filter 0
         {216, 68, 79, 19, 62, 21, 93, 100, 95, 604, 0, 43, 136, 47},  // tf32, 8 tiles, filter 1
         {216, 68, 79, 19, 62, 21, 93, 100, 95, 610, 0, 43, 136, 47},  // tf32, 8 tiles, filter 2
        },
        {{220, 61, 87, 19, 62, 21, 92, 109, 96, 458, 38, 43, 157, 71},  // tf32, 12 tiles, filter 0
         {220, 68, 87, 19, 62, 21, 95, 109, 96, 700, 0, 43, 157, 71},  // tf32, 12 tiles, filter 1
         {220, 68, 87, 19, 62, 21, 95, 109, 96, 706, 0, 43, 157, 71},  // tf32, 12 tiles, filter 2
        },
        {{219, 68, 103, 19, 62, 21, 94, 104, 95, 650, 38, 43, 196, 115},  // tf32, 20 tiles, filter 0
         {219, 68, 103, 19, 62, 21, 93, 104, 95, 892, 0, 43, 196, 115},  // tf32, 20 tiles, filter 1
         {219, 68, 103, 19, 62, 21, 93, 104, 95, 898, 0, 43, 196, 115},  // tf32, 20 tiles, filter 2
        },
    },
    {
        {{223, 61, 66, 19, 62, 21, 98, 423, 443, 634, 38, 43, 123, 36},  // float, 2 tiles, filter 0
         {267, 61, 42, 19, 62, 21, 104, 424, 443, 860, 0, 43, 114, 36},  // float, 2 tiles, filter 1
         {267, 61, 42, 19, 62, 21, 104, 424, 443, 866, 0, 43, 114, 36},  // float, 2 tiles, filter 2
        },
        {{223, 61, 67, 19, 62, 21, 92, 423, 443, 789, 38, 43, 136, 79},  // float, 3 tiles, filter 0
         {268, 68, 46, 19, 62, 21, 93, 431, 452, 1025, 0, 43, 127, 79},  // float, 3 tiles, filter 1
         {268, 68, 46, 19, 62, 21, 93, 431, 452, 1031, 0, 43, 127, 79},  // float, 3 tiles, filter 2
        },
        {{220, 61, 69, 19, 62, 21, 93, 423, 443, 955, 38, 43, 129, 15},  // float, 4 tiles, filter 0
         {264, 68, 48, 19, 62, 21, 94, 431, 452, 1190, 0, 43, 120, 15},  // float, 4 tiles, filter 1
         {264, 68, 48, 19, 62, 21, 94, 431, 452, 1196, 0, 43, 120, 15},  // float, 4 tiles, filter 2
        },
        {{218, 61, 79, 19, 62, 21, 96, 437, 458, 1581, 38, 43, 136, 47},  // float, 8 tiles, filter 0
         {235, 68, 55, 19, 62, 21, 93, 423, 443, 1803, 0, 43, 127, 47},  // float, 8 tiles, filter 1
         {235, 68, 55, 19, 62, 21, 93, 423, 443, 1809, 0, 43, 127, 47},  // float, 8 tiles, filter 2
        },
        {{221, 61, 87, 19, 62, 21, 97, 423, 442, 2200, 38, 44, 159, 71},  // float, 12 tiles, filter 0
         {222, 68, 87, 19, 62, 21, 94, 423, 442, 2443, 0, 44, 159, 71},  // float, 12 tiles, filter 1
         {222, 68, 87, 19, 62, 21, 94, 423, 442, 2449, 0, 44, 159, 71},  // float, 12 tiles, filter 2
        },
        {{218, 68, 101, 19, 62, 21, 96, 423, 443, 3431, 38, 43, 192, 117},  // float, 20 tiles, filter 0
         {218, 68, 101, 19, 62, 21, 98, 423, 443, 3679, 0, 43, 192, 117},  // float, 20 tiles, filter 1
         {218, 68, 101, 19, 62, 21, 97, 423, 443, 3685, 0, 43, 192, 117},  // float, 20 tiles, filter 2
        },
    },
    // counts: end
};
// clang-format on

}  // namespace cuda
}  // namespace mnv2
