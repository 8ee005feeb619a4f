// Classifies one image on a microcontroller with TFLite Micro.
//
// `hintjax export RUN_DIR --to c-array --output examples/microcontroller/student.c`
// writes student.c and student.h, which this file needs. See README.md.
#include <cstdint>
#include <cstdio>

#include "student.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
#include "tensorflow/lite/schema/schema_generated.h"

#ifndef STUDENT_ARENA_BYTES
#define STUDENT_ARENA_BYTES (64 * 1024)  // not measured: raise it if setup fails
#endif

alignas(16) static uint8_t arena[STUDENT_ARENA_BYTES];

int main() {
  tflite::MicroMutableOpResolver<STUDENT_OPERATIONS> resolver;
  STUDENT_ADD_OPERATIONS(resolver);
  tflite::MicroInterpreter student(tflite::GetModel(student_data), resolver, arena,
                                   STUDENT_ARENA_BYTES);
  if (student.AllocateTensors() != kTfLiteOk) return 1;
  uint8_t* image = student.input(0)->data.uint8;  // the pixels 0..255, as they are
  for (int i = 0; i < STUDENT_INPUT_SIZE; i++) image[i] = 0;  // read your camera here
  if (student.Invoke() != kTfLiteOk) return 1;
  const int8_t* logits = student.output(0)->data.int8;
  int best = 0;
  for (int i = 1; i < STUDENT_OUTPUT_SIZE; i++) {
    if (logits[i] > logits[best]) best = i;
  }
  printf("class %d, logit %f\n", best,
         STUDENT_OUTPUT_SCALE * (logits[best] - STUDENT_OUTPUT_ZERO_POINT));
}
