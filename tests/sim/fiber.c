/* Stacks switched with swapcontext(); fiber.h says what for. */
#include "fiber.h"

#include <stddef.h>
#include <ucontext.h>

#include "base/check.h"
#include "base/mem.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define STACK_BYTES (256u << 10)

/* A stack and where it stands. */
struct side {
    ucontext_t context;
    const void *stack;
    size_t stack_bytes;
    void *shadow; /* the sanitizer's */
};

struct fiber {
    struct side side;
    void (*body)(void *arg);
    void *arg;
    bool over;
};

static struct side world;
static struct fiber *current; /* NULL: the world runs */

/* On the stack of `side`, after `from` was left. */
static void arrived(struct side *side, struct side *from)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(side->shadow, &from->stack, &from->stack_bytes);
#else
    (void)side;
    (void)from;
#endif
}

static void change_sides(struct side *from, struct side *to, bool for_good)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? NULL : &from->shadow, to->stack, to->stack_bytes);
#else
    (void)for_good;
#endif
    CHECK(swapcontext(&from->context, &to->context) == 0);
    arrived(from, to);
}

static void begin(void)
{
    struct fiber *f = current;
    arrived(&f->side, &world);
    f->body(f->arg);
    f->over = true;
    change_sides(&f->side, &world, true);
}

struct fiber *fiber_new(void (*body)(void *arg), void *arg)
{
    struct fiber *f = mem_zalloc(sizeof *f);
    f->body = body;
    f->arg = arg;
    CHECK(getcontext(&f->side.context) == 0);
    void *stack = mem_alloc(STACK_BYTES);
    f->side.stack = stack;
    f->side.stack_bytes = STACK_BYTES;
    f->side.context.uc_stack.ss_sp = stack;
    f->side.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&f->side.context, begin, 0);
    return f;
}

void fiber_go_on(struct fiber *f)
{
    CHECK(!current && !f->over);
    current = f;
    change_sides(&world, &f->side, false);
    current = NULL;
}

bool fiber_is_over(const struct fiber *f)
{
    return f->over;
}

void fiber_wait(void)
{
    struct fiber *f = current;
    CHECK(f);
    change_sides(&f->side, &world, false);
}
