/*
 * No target: faults that a fuzzer must find, so that test_fuzz.py sees each way of finding one work.
 * PLANTED says which; it is behind four bytes that no input begins with by chance.
 */
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *fault = getenv("PLANTED");
    static volatile int sum;
    if (!fault || size < 5 || data[0] != 'f' || data[1] != 'l' || data[2] != 'a' || data[3] != 'w')
        return 0;
    if (strcmp(fault, "read") == 0) {
        uint8_t *copy = mem_alloc(size);
        memcpy(copy, data, size);
        sum += copy[size + data[4] % 8];
        free(copy);
    } else if (strcmp(fault, "undefined") == 0) {
        sum = 0x7fffff80;
        sum = sum + data[4];
    } else if (strcmp(fault, "check") == 0) {
        CHECK(data[4] < 0x80);
    } else if (strcmp(fault, "leak") == 0) {
        *(uint8_t *)mem_alloc(100) = 1;
    } else if (strcmp(fault, "memory") == 0) {
        free(memset(mem_alloc(1u << 30), 1, 1u << 30));
    } else if (strcmp(fault, "endless") == 0) {
        while (data[4] < 0x80)
            sum = 0;
    }
    return 0;
}
