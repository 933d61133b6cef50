"""After `import fedalt.peft`, PEFT and transformers load an exported folder by themselves."""

from fedalt.export.peft_type import register

register()
