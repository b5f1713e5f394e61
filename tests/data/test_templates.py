import pytest

from lpc_jax.data import templates
from lpc_jax.errors import UserError
from tests.data import tiny_tokenizers as tiny

HELLO = [{"role": "user", "content": "Hello"}]
# As Qwen3's: the variable is tested where the header is written.
THINKING = tiny.CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)


def rendered(template, **arguments):
    """What transformers makes of it: the second source of every text here."""
    return tiny.chatml(template=template).apply_chat_template(
        HELLO, tokenize=False, add_generation_prompt=True, **arguments
    )


@pytest.mark.parametrize(
    "template", [THINKING, "\n  " + THINKING, "  {% if x %}{% endif %}" + THINKING]
)
@pytest.mark.parametrize("thinking", [False, True])
def test_arguments_in_a_template_are_as_if_given_to_it(template, thinking):
    carried = templates.with_arguments(template, {"enable_thinking": thinking})
    assert rendered(carried) == rendered(template, enable_thinking=thinking)
    assert ("<think>" in rendered(carried)) == (not thinking)


def test_an_argument_given_goes_before_the_carried_one():
    carried = templates.with_arguments(THINKING, {"enable_thinking": False})
    assert rendered(carried, enable_thinking=True) == rendered(THINKING)


@pytest.mark.parametrize(
    "value", [True, 7, -0.25, 1e-9, 'it\'s\n"so"', "{{ 1 }} é 😀\\"]
)
def test_values_of_every_kind_arrive_whole_in_macros_too(value):
    template = "{% macro m() %}{{ x }}{% endmacro %}{{ x }}|{{ m() }}"
    carried = templates.with_arguments(template, {"x": value})
    assert rendered(carried) == rendered(template, x=value) == f"{value}|{value}"


def test_each_of_several_templates_carries_the_arguments():
    several = {"default": "{{ x }}", "tool_use": "tools {{ x }}"}
    carried = templates.with_arguments(several, {"x": 1})
    assert {name: rendered(text) for name, text in carried.items()} == {
        "default": "1",
        "tool_use": "tools 1",
    }


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        (THINKING, "enable_thinking"),
        (
            "{% for m in messages %}{% generation %}{{ b }}{% endgeneration %}"
            "{% break %}{% endfor %}{{ a }}{{ bos_token }}{{ strftime_now('%Y') }}",
            "a, b",
        ),
        ("{% set y = 1 %}{{ y }}", "no arguments"),
        (None, "no arguments"),
    ],
)
@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "y", "bos_token"])
def test_an_argument_that_no_template_reads_is_refused(template, reads, name):
    with pytest.raises(UserError) as raised:
        templates.with_arguments(template, {name: 1})
    assert str(raised.value) == (
        f"data.template_arguments: the chat template must read {name!r}, got one that"
        f" reads {reads}. Leave it out, or correct its name."
    )


def test_a_template_that_is_no_jinja_is_refused():
    with pytest.raises(UserError, match="must be Jinja, got one with"):
        templates.with_arguments("{% if %}", {"x": 1})


def test_a_dated_template_writes_the_day_that_it_is_given():
    template = (
        "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}"
        "{% else %}{% set d = 'never' %}{% endif %}"
        "{{ d }} {{ strftime_now('%A, %Y-%m-%d, 100 %j, %D %h %k') }}"
    )
    assert templates.day(template, "2026-11-27") == "2026-11-27"
    assert templates.day({"default": "", "tool_use": template}, None) is not None
    assert templates.day(THINKING, "2026-11-27") is None
    # The calendar: 27 November 2026 is a Friday and day 331.
    assert rendered(templates.dated(template, "2026-11-27")) == (
        "27 Nov 2026 Friday, 2026-11-27, 100 331, 11/27/26 Nov  0"
    )
    today = templates.today().isoformat()
    template = template.replace("%k", "")  # the hour, which is midnight's
    assert rendered(templates.dated(template, today)) == rendered(template)
