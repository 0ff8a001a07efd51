"""What every table of settings is made of."""

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

T = TypeVar("T")


def _switch(value: Any) -> Any:
    """`false` switches an optional table off; `true`, like an empty table, switches it on with its defaults."""
    return ({} if value else None) if isinstance(value, bool) else value


def _value(value: Any) -> Any:
    """`false` leaves a value unset; `true` is none, though pydantic would take it for 1."""
    if value is True:
        raise ValueError("takes a value, or false to leave it unset")
    return None if value is False else value


Optional = Annotated[T | None, BeforeValidator(_switch)]
Unset = Annotated[T | None, BeforeValidator(_value)]


def _some_or_none(value: Any) -> Any:
    """A single name is a list of one, `false` an empty one."""
    return () if value is False else (value,) if isinstance(value, str) else value


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("names a dataset twice")
    return names


def _amount(value: int | float | str) -> int | float | str:
    if isinstance(value, int) and value < 1:
        raise ValueError("a number of images is 1 or more; false takes none")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError("a share of the images is above 0 and at most 1.0; a number has no decimal point")
    if isinstance(value, str) and not value.strip():
        raise ValueError("a list file has a name")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_some_or_none), AfterValidator(_distinct)]
Amount = Annotated[int | float | str, AfterValidator(_amount)]
"""A number (int), a share (float), or the path of a list file."""
Size = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
Margins = tuple[
    Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """True and false are no numbers, though pydantic takes them for 1 and 0."""
        is_number = cls.model_fields[str(info.field_name)].annotation in (int, float)
        values = value if isinstance(value, list | tuple) else [value] if is_number else []
        if any(isinstance(item, bool) for item in values):
            raise ValueError("true and false are no numbers")
        return value
